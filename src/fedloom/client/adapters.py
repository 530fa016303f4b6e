"""Adapters: the small trainable part beside a frozen base model.

peft supplies the configuration, the matching of target modules and the file format; the forward pass is our own
linear layer with a leading client axis, so that K clients may train on one resident base in one pass (K = 1 trains
one client).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, TypeAlias

import peft
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from fedloom.client import slot_files
from fedloom.client.adapted import Owners, check_targets
from fedloom.client.attached import Attached
from fedloom.client.attached_lora import AttachedLora, replaced, told_targets
from fedloom.client.lora import LoraLinear, Siblings
from fedloom.client.peft_files import read_peft
from fedloom.client.quantize import is_linear
from fedloom.factors import Ranks
from fedloom.parts import Part
from fedloom.types import ModelError, suggest

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of neighbouring layers that most decoders call with one input; a call with another input is computed alone."""


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
    layered: ClassVar[bool] = True
    """Whether each of its tensors belongs to one layer of the model."""
    twice: ClassVar[bool] = False
    """Whether a pass goes through the layers twice before its gradient does, which layers that were cut cannot bear."""

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        """Yield why this adapter cannot run with other parts of the recipe, one sentence each."""
        return ()

    @classmethod
    def from_peft(cls, saved: peft.PeftConfig) -> Adapter | None:
        """Return the part that a PEFT folder's configuration describes; None: it is of another kind."""
        return None

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

    def attach(
        self, model: PreTrainedModel, reference: bool = False, kind: type[LoraLinear] = LoraLinear
    ) -> AttachedLora:
        config, names, owners = self.config(), self.target_modules(model), Owners()
        layers = replaced(model, names, lambda name, base: kind(base, self.r, self.dropout, reference, owners))
        for parent in {name.rpartition(".")[0] for name in names}:
            for kin in SHARED_INPUTS:
                group = tuple(layers[f"{parent}.{child}"] for child in kin if f"{parent}.{child}" in layers)
                together = Siblings(group) if len(group) > 1 else None
                for layer in group:
                    layer.siblings = together
        config.base_model_name_or_path = model.name_or_path
        return AttachedLora(layers, config, owners, self.scale)

    def read(self, folder: Path) -> dict[str, Tensor]:
        if slot_files.is_routed(folder):
            return slot_files.read_routed(folder, lambda one: read_peft(one, self.scale))
        return read_peft(folder, self.scale)

    @classmethod
    def from_peft(cls, saved: peft.PeftConfig) -> Adapter | None:
        if type(saved) is not peft.LoraConfig or saved.use_dora:
            return None
        return Lora(r=saved.r, alpha=saved.lora_alpha, rslora=saved.use_rslora, targets=told_targets(saved))

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
        check_targets(model, names)
        return names
