"""Quantised bases: frozen linear layers whose weight is kept in 4 or 8 bits and is dense only while it is multiplied.

nf4 (QLoRA, arXiv 2305.14314): blocks of 64 weights share a scale, each weight is one of 16 levels that are quantiles of
a normal distribution, and the scales are quantised once more, to 8 bits ("double quantisation"): 4.13 bits a weight.
int8: symmetric, one scale an output channel, W[i, j] = s[i] q[i, j] with s[i] = max_j |W[i, j]| / 127: 8 bits a weight.
Activations are never quantised: y = x dense(W)^T, and dx = dy dense(W) is its exact gradient.

The layers are our own, and bitsandbytes supplies the nf4 kernels only. On CPUs with AVX512-BF16 its `Linear4bit`
reorders the packed weight at the first forward without gradients (bitsandbytes 0.50.2): dequantising it after that
gives other weights, small layers fail, and outputs would depend on what was computed before. Its `Linear8bitLt`
quantises the activations too, so it is not x dense(W)^T.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, TypeAlias

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

Quantize: TypeAlias = Literal["none", "nf4", "int8"]
Mismatch: TypeAlias = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Name of a weight, the shape it has in the file, the shape that it should have."""

_BLOCK, _OUTER = 64, 256  # weights that share a scale, and scales that share theirs, as in the paper
_CHUNK = 2**16  # weights quantised at once: with whole weights, SmolLM2 left 200 MB of holes in the heap
_OLDEST = "0.49"  # of bitsandbytes: older ones have no CPU kernels or crash in them
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def dense(module: nn.Module) -> Tensor:
    """Return the frozen weight of a linear layer, (d_out, d_in), in the dtype it computes in.

    A plain layer's is its own weight, not a copy. A quantised layer's is made anew at each call: ask again in the
    backward pass instead of keeping it.
    """
    weight: Tensor = module.dense() if isinstance(module, Quantised) else module.weight  # type: ignore[assignment]
    return weight


def is_linear(module: nn.Module) -> bool:
    """Return whether `dense` and `shape` know the module: a quantised layer of this file or a plain linear one."""
    return isinstance(module, Quantised) or (isinstance(module, nn.Linear) and module.weight.dtype in _FLOATS)


def shape(module: nn.Module) -> tuple[int, int]:
    """Return (d_out, d_in) of a linear layer, whatever the shape in which its weight is stored."""
    if isinstance(module, Quantised):
        return module.out_features, module.in_features
    d_out, d_in = module.weight.shape  # type: ignore[misc]
    return d_out, d_in


def lacking(kind: Quantize) -> str:
    """Return what the kind needs and this environment lacks, in words; "" where there is nothing."""
    if kind != "nf4":
        return ""
    try:
        found = version("bitsandbytes")
    except PackageNotFoundError:
        return f"bitsandbytes>={_OLDEST}, which is not installed"
    return f"bitsandbytes>={_OLDEST}, and {found} is installed" if Version(found) < Version(_OLDEST) else ""


def count(model: nn.Module) -> int:
    """Return how many numbers the model holds: tied weights once, and quantised ones by number, not by bytes."""
    packed = [module for module in model.modules() if isinstance(module, Quantised)]
    plain = sum(p.numel() for p in model.parameters()) - sum(module.weight.numel() for module in packed)
    return plain + sum(module.out_features * module.in_features for module in packed)


def nbytes(model: nn.Module) -> int:
    """Return the bytes of the model's weights and buffers, those that share memory once."""
    storages = (t.untyped_storage() for t in (*model.parameters(), *model.buffers()))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class _Frozen(torch.autograd.Function):
    """x W^T + bias with a frozen W that is dequantised in each pass, so that the graph keeps x's shape and no W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Quantised) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.dense(), layer.bias)  # (..., d_in) -> (..., d_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.layer.dense(), None


class Quantised(nn.Module):
    """A frozen linear layer whose `weight` is packed; its state dict is that of the plain layer it stands for.

    So a merged export holds what was trained on: the dequantised weights, with the adapter added to them.

    Attributes:
        weight: packed, integer.  bias: (d_out,) or None.  dtype: of the dense weight.
    """

    bias: nn.Parameter | None

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features, self.dtype = plain.out_features, plain.in_features, plain.weight.dtype
        # until it is packed, of the plain dtype: transformers casts what it reads to the dtype of what it replaces
        self.weight = plain.weight.requires_grad_(False)
        self.register_parameter("bias", plain.bias)

    def pack(self, weight: Tensor) -> nn.Parameter:
        """Return the packed form of a weight (d_out, d_in) and keep what dequantises it; the caller assigns it."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """Return the weight (d_out, d_in) in `dtype`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        return _Frozen.apply(x, self)  # type: ignore[no-untyped-call,no-any-return]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.is_meta:  # transformers asks for the names before it loads
            return
        for name in self._buffers:
            destination.pop(prefix + name, None)
        destination[prefix + "weight"] = self.dense()

    def _load_from_state_dict(self, *args: Any) -> None:
        # the default would cast a dense weight to integers
        raise TypeError(f"a {type(self).__name__} does not load state dicts; load the model with model.quantize")


class Int8Linear(Quantised):
    """W[i, j] = s[i] q[i, j]: q int8 in -127..127, s (d_out, 1) in the dtype of the dense weight.

    |W - s q| <= s / 2, and rounding s q to the dtype adds at most half a unit in its last place.
    """

    scale: Tensor

    def pack(self, weight: Tensor) -> nn.Parameter:
        wide = torch.promote_types(self.dtype, torch.float32)
        # rounded first, so that q is chosen for the scale that it will be multiplied by; a row of zeros stays zero
        scale = (weight.abs().amax(1, keepdim=True).to(wide) / 127).to(self.dtype).clamp(torch.finfo(self.dtype).tiny)
        self.register_buffer("scale", scale)
        q = torch.empty_like(weight, dtype=torch.int8)
        few = max(1, _CHUNK // weight.shape[1])
        for part, w, s in zip(q.split(few), weight.split(few), scale.split(few), strict=True):
            part.copy_((w.to(wide) / s.to(wide)).round_().clamp_(-127, 127))
        return nn.Parameter(q, requires_grad=False)

    def dense(self) -> Tensor:
        return self.weight * self.scale  # one kernel, which writes in the scale's dtype


class Nf4Linear(Quantised):
    """The weight as rows of 64, row-major and padded with zeros, in bitsandbytes' NF4 with double quantisation."""

    absmax: Tensor
    offset: Tensor
    outer: Tensor
    levels: Tensor

    def pack(self, weight: Tensor) -> nn.Parameter:
        from bitsandbytes.functional import quantize_4bit, quantize_blockwise

        # Rows of one block each: bitsandbytes compiles a fallback for weights whose rows have an odd length
        flat = weight.to(self.dtype).reshape(-1)
        rows = functional.pad(flat, (0, -flat.numel() % _BLOCK)).view(-1, _BLOCK)
        parts = [quantize_4bit(w, blocksize=_BLOCK, quant_type="nf4") for w in rows.split(_CHUNK // _BLOCK)]
        absmax = torch.cat([state.absmax for _, state in parts])
        offset = absmax.mean()
        inner, state = quantize_blockwise(absmax - offset, blocksize=_OUTER)
        self.register_buffer("absmax", inner)  # (blocks,) uint8: index into `levels`
        self.register_buffer("offset", offset)  # mean scale, subtracted before the scales were quantised
        self.register_buffer("outer", state.absmax)  # (blocks / 256,) scales of the scales
        self.register_buffer("levels", state.code)  # (256,) shared by all layers on a CPU
        packed = torch.cat([part for part, _ in parts])  # (blocks 32, 1)
        return nn.Parameter(packed, requires_grad=False)

    def dense(self) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        outer = QuantState(absmax=self.outer, code=self.levels, blocksize=_OUTER, dtype=torch.float32)  # type: ignore[no-untyped-call]
        state = QuantState(  # type: ignore[no-untyped-call]
            absmax=self.absmax,
            shape=torch.Size((self.absmax.numel(), _BLOCK)),
            blocksize=_BLOCK,
            quant_type="nf4",
            dtype=self.dtype,
            offset=self.offset,
            state2=outer,
        )
        rows: Tensor = dequantize_4bit(self.weight, state)  # (blocks, 64)
        numbers = self.out_features * self.in_features
        return rows.view(-1)[:numbers].view(self.out_features, self.in_features)


_KINDS: dict[str, type[Quantised]] = {"int8": Int8Linear, "nf4": Nf4Linear}


# Quantising while transformers loads, one weight at a time, so that the model never exists densely.


@register_quantization_config("fedloom")
class _Config(QuantizationConfigMixin):  # type: ignore[misc]
    def __init__(self, kind: str) -> None:
        self.quant_method, self.kind = "fedloom", kind


@register_quantizer("fedloom")
class _Quantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces all linear layers but the output head, and the weights that stay in fp32."""

    is_trainable = True

    def __init__(self, config: _Config, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.mismatched: list[Mismatch] = []

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        kept = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and should_convert_module(name, kept):
                model.set_submodule(name, _KINDS[self.quantization_config.kind](module))

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        owner, _dot, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(owner), Quantised)

    def get_quantize_ops(self) -> _Pack:
        return _Pack(self)

    def is_serializable(self, **_: Any) -> bool:
        return True


class _Pack(ConversionOps):  # type: ignore[misc]
    def __init__(self, quantizer: _Quantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], model: PreTrainedModel, **_: Any) -> dict[str, Any]:
        packed = {}
        for name, value in input_dict.items():
            weight: Tensor = value[0] if isinstance(value, list) else value
            layer: Any = model.get_submodule(name.rpartition(".")[0])
            if weight.shape != shape(layer):  # transformers compares shapes of plain weights only
                self.quantizer.mismatched.append((name, tuple(weight.shape), shape(layer)))
                weight = weight.new_zeros(shape(layer))
            packed[name] = layer.pack(weight)
        return packed


def config(kind: Quantize) -> QuantizationConfigMixin | None:
    """Return what `from_pretrained` takes as `quantization_config` to load the kind; None for plain weights."""
    return None if kind == "none" else _Config(kind)


def finish(model: PreTrainedModel) -> list[Mismatch]:
    """Return the weights that had other shapes, and let a model that was loaded with `config` look plain again.

    Its configuration, state dict and `save_pretrained` are then those of a plain model with the dequantised weights.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, _Quantizer):
        return []
    quantizer.remove_quantization_config(model)
    return quantizer.mismatched


def quantised(model: nn.Module) -> Iterator[str]:
    """Yield the names of the quantised layers, in the model's order."""
    return (name for name, module in model.named_modules() if isinstance(module, Quantised))


def foreign(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the name and the class of each linear layer that somebody else quantised, which cannot be trained on."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not is_linear(module):
            yield name, type(module).__name__
