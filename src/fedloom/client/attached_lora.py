"""LoRA layers in a resident model: how they get their weights, and what becomes of them on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from statistics import mode
from typing import Any, TypeVar

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedloom import baselog, factors, seeds, slots
from fedloom.client import slot_files
from fedloom.client.adapted import Owners
from fedloom.client.attached import Attached, check_fit
from fedloom.client.lora import Beside, LoraLinear
from fedloom.client.peft_files import load_peft, save_peft
from fedloom.client.stack import Stack
from fedloom.factors import Scale
from fedloom.types import Merge, ModelError, Tensors


class AttachedLora(Attached):
    """The LoRA layers that were put into one resident model, and the way to set their weights.

    Attributes:
        layers: live module name -> its layer, in the model's order.
        config: the peft configuration that describes them.
        scale: rank -> what the low-rank product is multiplied by.
    """

    layers: dict[str, LoraLinear]

    def __init__(self, layers: Mapping[str, LoraLinear], config: peft.LoraConfig, owners: Owners, scale: Scale) -> None:
        self.layers, self.config, self.owners, self.scale = dict(layers), config, owners, scale
        self.first = next(iter(self.layers.values()))
        self.drops = config.lora_dropout > 0
        self._log: tuple[Merge, ...] = ()

    def rebase(self, log: Sequence[Merge]) -> None:
        """Let the frozen base be the untouched one plus the merges of a base log, whatever it was before.

        The weights are W_0 plus the whole change, rounded once, so they do not depend on the way. The first merge
        makes a copy of W_0 of every layer that changes; a quantised layer keeps its change beside it.
        """
        if len(log) == len(self._log) and all(new is old for new, old in zip(log, self._log, strict=True)):
            return
        with torch.inference_mode(mode=False), torch.no_grad():
            for module in dict.fromkeys([*baselog.modules(log), *baselog.modules(self._log)]):
                parts = baselog.dense_part(log, module), baselog.low_part(log, module)
                self.layers[module].shift(*parts)
        self._log = tuple(log)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return trainable name -> shape: `<module>.lora_A` (r, d_in) and `<module>.lora_B` (d_out, r)."""
        names: dict[str, tuple[int, ...]] = {}
        for module, layer in self.layers.items():
            names[f"{module}.lora_A"] = (layer.r, layer.d_in)
            names[f"{module}.lora_B"] = (layer.d_out, layer.r)
        return names

    def check(self, params: Tensors) -> None:
        """Raise ModelError unless the layers can take an adapter: `shapes()`, but every module in a rank of its own.

        Further slots may stand beside it (`fedloom.slots`).
        """
        more = self._more(params)
        check_fit(params, {**self.shapes(), **more} if more else self.shapes(), any_rank=True)

    def order(self, params: Tensors) -> list[str]:
        return [name for name in [*self.shapes(), *self._more(params)] if name in params]

    def _more(self, params: Tensors) -> dict[str, tuple[int, ...]]:
        if not slots.is_mixture(params):
            return {}
        return slots.shapes(params, {module: (layer.d_out, layer.d_in) for module, layer in self.layers.items()})

    def init(self, seed: int, dtype: torch.dtype = torch.float32, round_: int | None = None) -> dict[str, Tensor]:
        """Return peft's starting point drawn from our own stream: A Kaiming-uniform (a = sqrt 5), B zero.

        Args:
            round_: draws an adapter for one round; None: the one that the run starts from.
        """
        stream, start = seeds.generator(seed, round_, None, "adapter"), {}
        for name, shape in self.shapes().items():
            start[name] = torch.zeros(shape, dtype=dtype)
            if name.endswith("lora_A"):
                # drawn in float32 whatever the dtype, so that a fp64 run starts where the fp32 run does
                a = torch.empty(shape)
                nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=stream)
                start[name].copy_(a)
        return start

    def like(self) -> Tensor:
        return self.first.weight()

    def bind(self, stack: Stack) -> None:
        for module, layer in self.layers.items():
            layer.a, layer.b = stack.views[f"{module}.lora_A"], stack.views[f"{module}.lora_B"]
            layer.core = stack.views.get(f"{module}.lora_R")
            scales = self._scales(stack, module)
            layer.scale = scales[0] if min(scales) == max(scales) else layer.a.new_tensor(scales).view(-1, 1, 1)
            layer.beside = self._beside(stack, module, scales)
            layer.enabled = True
            if layer.siblings is not None:
                layer.siblings.forget()

    def _scales(self, stack: Stack, module: str) -> list[float]:
        """Return the scale of each client's pair in a module."""
        return [self.scale(shape[0]) for shape in stack.ranks(f"{module}.lora_A")]

    def _beside(self, stack: Stack, module: str, scales: Sequence[float]) -> Beside | None:
        """Return a layer's further slots, whose scales are told as factors of the main one's; None: it has none."""
        count, names = slots.count(stack.views), [f"{module}.{name}" for name in (slots.MIX, slots.ROUTER)]
        if count == 1 and not any(name in stack.views for name in names):
            return None
        more = [f"{module}.slot{i}" for i in range(1, count)]
        factors = [[a / b for a, b in zip(self._scales(stack, one), scales, strict=True)] for one in more]
        return Beside(
            [(stack.views[f"{one}.lora_A"], stack.views[f"{one}.lora_B"]) for one in more],
            [stack.flat.new_tensor(one).view(-1, 1, 1) for one in factors],
            *(stack.views.get(name) for name in names),
        )

    @contextmanager
    def off(self) -> Iterator[None]:
        before, log = self.first.enabled, self._log
        self.rebase(())
        for layer in self.layers.values():
            layer.enabled = False
        try:
            yield
        finally:
            self.rebase(log)
            for layer in self.layers.values():
                layer.enabled = before

    @contextmanager
    def dropout(self, streams: Sequence[torch.Generator]) -> Iterator[None]:
        for layer in self.layers.values():
            layer.streams = tuple(streams)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.streams = ()

    def merged(self, model: PreTrainedModel, params: Tensors) -> dict[str, Tensor]:
        self.check(params)
        state = {}
        for name, value in model.state_dict().items():
            state[name.replace(".base.", ".")] = value
        try:
            params = slots.collapsed(params, self.scale)
        except ValueError as error:
            raise ModelError(f"the adapter cannot be merged into the weights: {error}") from error
        for module, layer in self.layers.items():
            a, b = params[f"{module}.lora_A"], params[f"{module}.lora_B"]
            delta = layer.delta(a, b, self.scale(len(a)))
            weight = state[f"{module}.weight"]
            state[f"{module}.weight"] = (weight.to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)
        return state

    def save(self, folder: Path, params: Tensors, base: str) -> None:
        if any(map(slots.is_router, params)):
            slot_files.save_routed(folder, params, lambda place, one: self.save(place, one, base))
            return
        one = slots.collapsed(params, self.scale)
        save_peft(folder, one, described(self.config, one, self.scale), base)

    def read(self, folder: Path) -> dict[str, Tensor]:
        if slot_files.is_routed(folder):
            raise ModelError(f"{folder} is a mixture with a router; name one of its parts: {folder / 'slot0'}")
        return load_peft(folder, self.config)


def described(config: peft.LoraConfig, params: Tensors, scale: Scale) -> peft.LoraConfig:
    """Return peft's configuration of an adapter whose modules may have any rank.

    Args:
        config: of the recipe's adapter.  params: the adapter.  scale: rank -> what its products are multiplied by.
    """
    found = factors.pairs(params, scale)
    told = copy(config)
    root = math.sqrt if config.use_rslora else float
    alphas = {module: pair.scale * root(pair.rank) for module, pair in found.items()}
    told.r = mode(pair.rank for pair in found.values())
    told.rank_pattern = {module: pair.rank for module, pair in found.items() if pair.rank != told.r}
    told.alpha_pattern = {m: alpha for m, alpha in alphas.items() if not math.isclose(alpha, config.lora_alpha)}
    return told


def told_targets(saved: peft.PeftConfig) -> Any:
    """Return `adapter.targets` of a PEFT configuration."""
    targets = saved.target_modules
    return "all-linear" if targets == "all-linear" else tuple(sorted(targets or ()))


L = TypeVar("L", bound=nn.Module)


def replaced(model: nn.Module, names: Iterable[str], make: Callable[[str, nn.Module], L]) -> dict[str, L]:
    """Put layers in the place of some modules of a model, in place; return name -> layer.

    Args:
        make: (name, module) -> the layer that takes its place.
    """
    layers = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        layers[name] = make(name, getattr(owner, child))
        setattr(owner, child, layers[name])
    return layers
