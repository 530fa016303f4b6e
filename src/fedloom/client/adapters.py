"""Adapters: the small trainable part beside a frozen base model.

peft supplies the configuration, the matching of target modules and the file format; the forward pass is our own
linear layer with a leading client axis, so that K clients may train on one resident base in one pass (K = 1 trains
one client).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import peft
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedloom import seeds
from fedloom.client.lora import LoraLinear, Owners, Siblings, Spans
from fedloom.client.quantize import is_linear
from fedloom.client.stack import Stack
from fedloom.parts import Part
from fedloom.types import ModelError, Tensors, suggest

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of neighbouring layers that most decoders call with one input; a call with another input is computed alone."""


class Attached:
    """The LoRA layers that were put into one resident model, and the way to set their weights.

    Attributes:
        layers: live module name -> its layer, in the model's order.
        config: the peft configuration that describes them.
        owners: whose tokens the layers see.  scale: rank -> what the low-rank product is multiplied by.
    """

    def __init__(
        self, layers: Mapping[str, LoraLinear], config: peft.LoraConfig, owners: Owners, scale: Callable[[int], float]
    ) -> None:
        self.layers, self.config, self.owners, self.scale = dict(layers), config, owners, scale
        self.first = next(iter(self.layers.values()))

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return trainable name -> shape: `<module>.lora_A` (r, d_in) and `<module>.lora_B` (d_out, r)."""
        names = {}
        for module, layer in self.layers.items():
            names[f"{module}.lora_A"] = (layer.r, layer.d_in)
            names[f"{module}.lora_B"] = (layer.d_out, layer.r)
        return names

    def init(self, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return peft's starting point drawn from our own stream: A Kaiming-uniform (a = sqrt 5), B zero."""
        stream, start = seeds.generator(seed, None, None, "adapter"), {}
        for name, shape in self.shapes().items():
            start[name] = torch.zeros(shape, dtype=dtype)
            if name.endswith("lora_A"):
                # drawn in float32 whatever the dtype, so that a fp64 run starts where the fp32 run does
                a = torch.empty(shape)
                nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=stream)
                start[name].copy_(a)
        return start

    def load(self, clients: Sequence[Tensors], moving: Callable[[str], bool] | None = None) -> Stack:
        """Put the weights of K clients into the layers, stacked.

        Args:
            clients: one name -> tensor map a client, names as in `shapes()`; a client may have a rank of its own,
                module by module, whose scale is then that of its rank.
            moving: which names will be trained; None: all.

        Returns:
            Their tensors in one buffer, on the layers' device, in at least float32.

        Raises:
            ModelError: names or shapes do not fit this adapter.
        """
        shapes = self.shapes()
        for tensors in clients:
            check_fit(tensors, shapes, any_rank=True)
        weight = self.first.weight()
        # in the model's order, whatever the order of the message, as sums such as a norm depend on it
        ordered = [{name: tensors[name] for name in shapes} for tensors in clients]
        stack = Stack(ordered, weight.device, torch.promote_types(weight.dtype, torch.float32), moving)
        self.bind(stack)
        return stack

    def bind(self, stack: Stack) -> None:
        """Let the layers compute with what is in the stack now."""
        for module, layer in self.layers.items():
            layer.a, layer.b = stack.views[f"{module}.lora_A"], stack.views[f"{module}.lora_B"]
            ranks = [shape[0] for shape in stack.ranks(f"{module}.lora_A")]
            scales = [self.scale(rank) for rank in ranks]
            layer.scale = scales[0] if min(ranks) == max(ranks) else layer.a.new_tensor(scales).view(-1, 1, 1)
            layer.enabled = True
            if layer.siblings is not None:
                layer.siblings.forget()

    @contextmanager
    def owned(self, tokens: Spans) -> Iterator[None]:
        """Within the context a pass holds `tokens[k]` tokens of client k, client after client."""
        self.owners.tokens = tokens
        try:
            yield
        finally:
            self.owners.tokens = None

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the context the model computes as the untouched base."""
        before = self.first.enabled
        for layer in self.layers.values():
            layer.enabled = False
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enabled = before

    @contextmanager
    def dropout(self, streams: Sequence[torch.Generator]) -> Iterator[None]:
        """Within the context the layers drop inputs, client k's rows by `streams[k]`; outside they never do."""
        for layer in self.layers.values():
            layer.streams = tuple(streams)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.streams = ()

    def merged(self, model: PreTrainedModel, params: Tensors) -> dict[str, Tensor]:
        """Return the state dict of the plain model with the adapter added to its weights, in the base's dtype.

        Args:
            model: the resident model that the layers are in.
            params: the adapter, names as in `shapes()`.
        """
        check_fit(params, self.shapes())
        state = {}
        for name, value in model.state_dict().items():
            state[name.replace(".base.", ".")] = value
        for module, layer in self.layers.items():
            a, b = params[f"{module}.lora_A"], params[f"{module}.lora_B"]
            delta = layer.delta(a, b, self.scale(len(a)))
            weight = state[f"{module}.weight"]
            state[f"{module}.weight"] = (weight.to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)
        return state


def check_fit(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], any_rank: bool = False) -> None:
    """Raise ModelError unless `tensors` has the names and shapes of `shapes` (`any_rank`: but for LoRA ranks)."""
    if any_rank:
        shapes = {name: _with_rank(name, shape, tensors) for name, shape in shapes.items()}
    missing, extra = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    wrong = [n for n in shapes if n in tensors and tuple(tensors[n].shape) != tuple(shapes[n])]
    if not (missing or extra or wrong):
        return
    lines = [f"missing {len(missing)}, such as {missing[0]}"] if missing else []
    lines += [f"unexpected {len(extra)}, such as {extra[0]}"] if extra else []
    lines += [f"{n} has shape {tuple(tensors[n].shape)}, expected {tuple(shapes[n])}" for n in wrong[:3]]
    raise ModelError("the adapter's tensors do not fit the model: " + "; ".join(lines))


def _with_rank(name: str, shape: tuple[int, ...], tensors: Tensors) -> tuple[int, ...]:
    """Return the shape with the rank of the tensors' own A."""
    module, _, factor = name.rpartition(".")
    a = tensors.get(f"{module}.lora_A")
    if a is None or a.dim() != 2 or not len(a):
        return shape
    return (len(a), shape[1]) if factor == "lora_A" else (shape[0], len(a))


class Adapter(Part, family=True):
    """What is trained and exchanged beside the frozen base."""

    stackable: ClassVar[bool] = False
    """Whether its layers can hold several clients' weights in one pass."""

    def attach(self, model: PreTrainedModel, reference: bool = False) -> Attached:
        """Put the adapter's layers into `model`, in place, once; `reference` selects the plain, slower arithmetic."""
        raise NotImplementedError


class Lora(Adapter, name="lora"):
    """Low-rank adaptation (arXiv 2106.09685): W + s B A with s = alpha / r, or alpha / sqrt r (arXiv 2312.03732)."""

    stackable: ClassVar[bool] = True

    r: PositiveInt = 8
    """Rank of the update of each target matrix."""
    alpha: PositiveFloat = 16.0
    """Scale: the update is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which an input element of the low-rank path is dropped while training."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """`all-linear` (every linear layer but the output head) or name endings such as [q_proj, v_proj]."""
    rslora: bool = False
    """Rank-stabilised scale alpha / sqrt r."""

    def config(self) -> peft.LoraConfig:
        """Return peft's configuration of the same adapter."""
        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        return peft.LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            use_rslora=self.rslora,
            bias="none",
            task_type="CAUSAL_LM",
        )

    def attach(self, model: PreTrainedModel, reference: bool = False) -> Attached:
        config, names, owners = self.config(), self.target_modules(model), Owners()
        layers = {}
        for name in names:
            parent, _, child = name.rpartition(".")
            owner = model.get_submodule(parent)
            layers[name] = LoraLinear(getattr(owner, child), self.r, self.dropout, reference, owners)
            setattr(owner, child, layers[name])
        for parent in {name.rpartition(".")[0] for name in names}:
            for kin in SHARED_INPUTS:
                group = tuple(layers[f"{parent}.{child}"] for child in kin if f"{parent}.{child}" in layers)
                together = Siblings(group) if len(group) > 1 else None
                for layer in group:
                    layer.siblings = together
        config.base_model_name_or_path = model.name_or_path
        return Attached(layers, config, owners, self.scale)

    def scale(self, rank: int) -> float:
        """Return what the low-rank product of a rank is multiplied by."""
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)

    def target_modules(self, model: PreTrainedModel) -> list[str]:
        """Return the names of the modules that peft would adapt, in the model's order.

        Raises:
            ModelError: a target matches no module, or a module of a kind that has no LoRA layer here.
        """
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if is_linear(m)})
        if not isinstance(self.targets, str):
            ends = {n.rpartition(".")[2] for n, _ in model.named_modules()} | {n for n, _ in model.named_modules()}
            lost = [t for t in self.targets if t not in ends and not any(n.endswith("." + t) for n in ends)]
            if lost or not self.targets:
                hint = suggest(lost[0], linear) if lost else ""
                raise ModelError(
                    f"adapter.targets: no module of {model.name_or_path} is named "
                    f"{', '.join(map(repr, lost)) or '(empty)'}"
                    f"{hint}; linear modules: {', '.join(linear)}; or all-linear"
                )
        # peft decides on a copy without storage, so the resident model stays untouched
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ghost = peft.get_peft_model(type(model)(model.config), self.config())
        prefix = "base_model.model."
        names = [n.removeprefix(prefix) for n, m in ghost.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        for name in names:
            LoraLinear.check(name, model.get_submodule(name))
        return names


def save_peft(folder: Path, params: Tensors, config: peft.LoraConfig, base: str) -> None:
    """Write `params` as a PEFT adapter folder that `peft.PeftModel.from_pretrained` loads.

    Args:
        folder: created if absent; files of the same names are replaced.
        params: live name -> tensor, as `Attached.shapes` names them.
        config: the adapter's configuration.
        base: name of the base model, written into the adapter's configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saved = {f"base_model.model.{name}.weight": t.detach().cpu().contiguous() for name, t in sorted(params.items())}
    # written here, since `save_file` reports a full disk as a SafetensorError without its cause
    (folder / "adapter_model.safetensors").write_bytes(save(saved, metadata={"format": "pt"}))
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))


def load_peft(folder: Path, like: peft.LoraConfig | None = None) -> dict[str, Tensor]:
    """Read the tensors of a PEFT LoRA folder under their live names.

    Args:
        folder: the PEFT folder.
        like: the configuration that its rank and scale must be those of; None: not checked.

    Raises:
        ModelError: the folder holds no safetensors LoRA adapter, or one of another rank or scale.
    """
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        pickled = (
            " (adapter_model.bin is a pickle, which is never loaded)" if (folder / "adapter_model.bin").exists() else ""
        )
        raise ModelError(f"{folder} holds no adapter_model.safetensors{pickled}; a run folder's adapter/ is one")
    if like is not None:
        _check_scale(folder, like)
    try:
        saved: dict[str, Any] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error
    return {name.removeprefix("base_model.model.").removesuffix(".weight"): t for name, t in saved.items()}


def _check_scale(folder: Path, like: peft.LoraConfig) -> None:
    """Refuse an adapter whose numbers would mean something else under the recipe's configuration."""
    try:
        found = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'adapter_config.json'} cannot be read: {error}") from error
    pairs = {"r": like.r, "lora_alpha": like.lora_alpha, "use_rslora": like.use_rslora}
    odd = [f"{k} is {found.get(k)!r}, the recipe's {v!r}" for k, v in pairs.items() if found.get(k, False) != v]
    if odd:
        raise ModelError(f"{folder}: {'; '.join(odd)}; set adapter.r, adapter.alpha and adapter.rslora to its values")
