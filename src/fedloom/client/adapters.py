"""Adapters: the small trainable part beside a frozen base model.

peft supplies the configuration, the matching of target modules and the file format; the forward pass is our own
linear layer with a leading client axis, so that K clients may train on one resident base in one pass (K = 1 trains
one client).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cache
from pathlib import Path
from statistics import mode
from typing import Annotated, ClassVar, Literal, Self, TypeAlias

import peft
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedloom import baselog, factors, seeds
from fedloom.client.attached import Attached, check_fit
from fedloom.client.lora import LoraLinear, Owners, Siblings
from fedloom.client.peft_files import load_peft, read_peft, save_peft
from fedloom.client.quantize import is_linear
from fedloom.client.stack import Stack
from fedloom.factors import Ranks, Scale
from fedloom.parts import Part
from fedloom.types import Merge, ModelError, Tensors, suggest

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of neighbouring layers that most decoders call with one input; a call with another input is computed alone."""


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
        """Raise ModelError unless the layers can take an adapter: `shapes()`, but every module in a rank of its own."""
        check_fit(params, self.shapes(), any_rank=True)

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
            ranks = [shape[0] for shape in stack.ranks(f"{module}.lora_A")]
            scales = [self.scale(rank) for rank in ranks]
            layer.scale = scales[0] if min(ranks) == max(ranks) else layer.a.new_tensor(scales).view(-1, 1, 1)
            layer.enabled = True
            if layer.siblings is not None:
                layer.siblings.forget()

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
        for module, layer in self.layers.items():
            a, b = params[f"{module}.lora_A"], params[f"{module}.lora_B"]
            delta = layer.delta(a, b, self.scale(len(a)))
            weight = state[f"{module}.weight"]
            state[f"{module}.weight"] = (weight.to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)
        return state

    def save(self, folder: Path, params: Tensors, base: str) -> None:
        save_peft(folder, params, described(self.config, params, self.scale), base)

    def read(self, folder: Path) -> dict[str, Tensor]:
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


def _ends(module: str, ending: str) -> bool:
    return module == ending or module.endswith("." + ending)


def _by_ending(ranks: Mapping[str, int], module: str, default: int) -> int:
    return next((rank for ending, rank in ranks.items() if _ends(module, ending)), default)


class Adapter(Part, family=True):
    """What is trained and exchanged beside the frozen base."""

    stackable: ClassVar[bool] = False
    """Whether its layers can hold several clients' weights in one pass."""
    pairs: ClassVar[bool] = False
    """Whether its tensors are LoRA factors: A and B of every module."""
    core: ClassVar[bool] = False
    """Whether they are frozen LoRA factors and a small R between them, the only one that is trained."""

    def attach(self, model: PreTrainedModel, reference: bool = False) -> Attached:
        """Put the adapter's layers into `model`, in place, once; `reference` selects the plain, slower arithmetic."""
        raise NotImplementedError

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Read a PEFT folder so that its tensors, under their live names, mean the same in this adapter.

        Raises:
            ModelError: the folder holds no such adapter.
        """
        raise NotImplementedError

    def lora_ranks(self, attached: Attached, clients: Sequence[str]) -> Ranks | None:
        """Return what is known of LoRA ranks; None: the adapter has no LoRA factors.

        Args:
            clients: all of the run, in client order.
        """
        return None

    def scale(self, rank: int) -> float:
        """Return what the low-rank product of a rank is multiplied by; for adapters with LoRA factors."""
        raise NotImplementedError


Rank: TypeAlias = PositiveInt | dict[str, PositiveInt]
"""A rank for all modules, or module name ending -> rank; modules that none names have the global rank."""


class Lora(Adapter, name="lora"):
    """Low-rank adaptation (arXiv 2106.09685): W + s B A with s = alpha / r, or alpha / sqrt r (arXiv 2312.03732)."""

    stackable: ClassVar[bool] = True
    pairs: ClassVar[bool] = True

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
    ranks: tuple[Rank, ...] | dict[str, Rank] = ()
    """Ranks of the clients where they differ, none above `r`: a list is dealt out in client order, over and over; a
    mapping names clients. One entry is a number, or name endings of modules with their ranks."""

    @model_validator(mode="after")
    def _ranks_fit(self) -> Self:
        entries = self.ranks.values() if isinstance(self.ranks, dict) else self.ranks
        largest = max((max(one.values()) if isinstance(one, dict) else one for one in entries), default=0)
        if largest > self.r:
            raise ValueError(
                f"adapter.ranks holds rank {largest}, above adapter.r={self.r}, the rank of the global adapter; raise "
                "adapter.r or lower it"
            )
        return self

    def lora_ranks(self, attached: Attached, clients: Sequence[str]) -> Ranks:
        modules, places = list(attached.layers), {name: i for i, name in enumerate(clients)}
        self._check_ranks(modules, clients)

        @cache
        def as_told(index: int | str) -> Mapping[str, int]:
            one = self.ranks[index]  # type: ignore[index]
            return {module: one if isinstance(one, int) else _by_ending(one, module, self.r) for module in modules}

        whole = dict.fromkeys(modules, self.r)

        def of(client: str) -> Mapping[str, int]:
            if isinstance(self.ranks, dict):
                return as_told(client) if client in self.ranks else whole
            return as_told(places.get(client, 0) % len(self.ranks)) if self.ranks else whole

        return Ranks(whole, of, self.scale)

    def _check_ranks(self, modules: Sequence[str], clients: Sequence[str]) -> None:
        entries = self.ranks.values() if isinstance(self.ranks, dict) else self.ranks
        lost = {
            end for one in entries if isinstance(one, dict) for end in one if not any(_ends(m, end) for m in modules)
        }
        if lost:
            known = sorted({module.rpartition(".")[2] for module in modules})
            raise ModelError(
                f"adapter.ranks: no adapted module is named {', '.join(sorted(map(repr, lost)))}; modules: "
                f"{', '.join(known)}"
            )
        strangers = sorted(set(self.ranks) - set(clients)) if isinstance(self.ranks, dict) else []
        if strangers:
            raise ModelError(
                f"adapter.ranks: there is no client {strangers[0]!r}{suggest(strangers[0], clients)}; clients: "
                f"{', '.join(list(clients)[:10])}"
            )

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

    def attach(self, model: PreTrainedModel, reference: bool = False) -> AttachedLora:
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
        return AttachedLora(layers, config, owners, self.scale)

    def read(self, folder: Path) -> dict[str, Tensor]:
        return read_peft(folder, self.scale)

    def scale(self, rank: int) -> float:
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
