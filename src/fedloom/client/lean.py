"""The two elementwise blocks of a Llama-like layer as one node each: fewer passes over memory, fewer things kept.

    RMSNorm:  y = w * x rho,  rho = (mean(x^2) + eps)^(-1/2);   dx = rho (g - x rho mean(g x rho)),  g = w * dy,
             dw = sum dy * x rho where the weight is trained.
    SwiGLU:   y = silu(a) * b;   da = silu'(a) * b * dy,  db = silu(a) * dy.

Autograd keeps a float32 copy of every norm's input and silu(a) beside a and b; these keep x and rho, and a and b. Used
on half-precision models, where that matters; others compute as transformers wrote them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from fedloom.client.quantize import Quantised, is_linear

HALF = (torch.bfloat16, torch.float16)


class _RmsNorm(torch.autograd.Function):
    """x (..., d), weight (d,): sums in float32, the product with the weight in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        rho = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, rho, weight)
        return wide.mul_(rho).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, rho, weight = ctx.saved_tensors
        normed = x.to(rho.dtype, copy=True).mul_(rho)
        dw = None
        if ctx.needs_input_grad[1]:
            dw = (dy * normed).flatten(0, -2).sum(0).to(weight.dtype)
        g = (dy * weight).to(rho.dtype)
        return g.sub_(normed.mul_((g * normed).mean(-1, keepdim=True))).mul_(rho).to(x.dtype), dw, None


class _SwiGlu(torch.autograd.Function):
    """a, b (..., d) -> silu(a) * b."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return functional.silu(a).mul_(b)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * b, a), functional.silu(a).mul_(dy)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the root-mean-square norm (arXiv 1910.07467) of x (..., d) times a weight (d,)."""
    out: Tensor = _RmsNorm.apply(x, weight, eps)
    return out


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """Return silu(a) * b (arXiv 2002.05202)."""
    out: Tensor = _SwiGlu.apply(a, b)
    return out


def lean(model: PreTrainedModel) -> int:
    """Let the norms and gated MLPs of a half-precision model compute as above, in place; return how many do.

    A module qualifies by its attributes, and by giving the same output on a trial input: others stay as they are.
    """
    changed, device, dtype, kernels = 0, model.device, model.dtype, _kernels(model.device)
    for module in model.modules():
        block = _norm(module, kernels.norm) or _mlp(module, kernels.gated)
        if block is None:
            continue
        width, forward = block
        trial = torch.linspace(-2, 2, 3 * width).view(3, width).to(device, dtype)
        with torch.no_grad():
            expected, got = module(trial), forward(trial)
        if (expected - got).abs().max() <= 1e-2 * expected.abs().max():
            module.forward = forward
            changed += 1
    return changed


class _Kernels(NamedTuple):
    """How the two blocks are computed: norm(x, weight, eps) and gated(a, b)."""

    norm: Callable[[Tensor, Tensor, float], Tensor]
    gated: Callable[[Tensor, Tensor], Tensor]


def _kernels(device: torch.device) -> _Kernels:
    """Return Liger's kernels (arXiv 2410.10989) on a GPU where they are installed, else those above."""
    if device.type != "cuda" or find_spec("liger_kernel") is None:
        return _Kernels(rms_norm, swiglu)
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    # 0: no offset on the weight; "llama": sums in float32, product in half; False: dy is read again by others
    return _Kernels(
        lambda x, w, eps: LigerRMSNormFunction.apply(x, w, eps, 0.0, "llama", False), LigerSiLUMulFunction.apply
    )


def _norm(
    module: nn.Module, norm: Callable[[Tensor, Tensor, float], Tensor]
) -> tuple[int, Callable[[Tensor], Tensor]] | None:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not type(module).__name__.endswith("RMSNorm") or eps is None or weight is None or weight.dtype not in HALF:
        return None
    return weight.shape[0], lambda hidden_states: norm(hidden_states, module.weight, eps)  # type: ignore[arg-type]


def _mlp(module: nn.Module, gated: Callable[[Tensor, Tensor], Tensor]) -> tuple[int, Callable[[Tensor], Tensor]] | None:
    layers = [getattr(module, part, None) for part in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(layer, nn.Module) and is_linear(layer) for layer in layers) or not hasattr(module, "act_fn"):
        return None
    gate: Any = layers[0]
    if (gate.dtype if isinstance(gate, Quantised) else gate.weight.dtype) not in HALF:
        return None
    return gate.in_features, partial(_gated, module, gated)


def _gated(module: Any, gated: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    return module.down_proj(gated(module.gate_proj(x), module.up_proj(x)))  # type: ignore[no-any-return]
