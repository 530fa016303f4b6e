"""How a cohort's updates become one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.parts import Part
from fedloom.types import Bundle, ClientUpdate, Message, Tensors


@dataclass(frozen=True, slots=True)
class Around:
    """What an aggregator may know beside the updates.

    Attributes:
        params: the global weights that the updates change.
        scale: rank -> scale of LoRA factors; None: the adapter has none.
        kept: what it returned as group `aggregator` in the round before; empty before the first.
        stream: its random stream of the round.
    """

    params: Tensors
    scale: Callable[[int], float] | None
    kept: Bundle
    stream: torch.Generator


class Aggregator(Part, family=True):
    """Combines updates into one message.

    Group `cohort` of the result holds `clients` and `weight` as scalars; what must outlive the round goes into group
    `aggregator`.
    """

    def conflicts(self, clients: int) -> Iterable[str]:
        """Yield why it cannot combine the updates of so many clients, one sentence each."""
        return ()

    def combine(self, updates: Iterable[ClientUpdate], around: Around) -> Message:
        """Combine updates, which come in client order.

        Raises:
            ValueError: there is no update, or updates differ in their groups or tensor names.
        """
        raise NotImplementedError


class Mean(Aggregator, name="mean"):
    """The weighted mean of every tensor, folded one update at a time, so one update is in memory.

    The mean is updated as m <- m + w/W (x - m) with W the weight so far, in at least float32: equal updates give
    exactly themselves, and one update gives exactly itself.
    """

    def combine(self, updates: Iterable[ClientUpdate], around: Around) -> Message:
        mean: dict[str, dict[str, Tensor]] = {}
        total, count = 0.0, 0
        for update in updates:
            total, count = total + update.weight, count + 1
            groups = update.message.groups
            if count == 1:
                mean = {g: {n: _wide(t).clone() for n, t in b.tensors.items()} for g, b in groups.items()}
                continue
            _check(mean, update)
            share = update.weight / total
            for group, bundle in groups.items():
                for name, t in bundle.tensors.items():
                    m = mean[group][name]
                    m.add_(t.to(m.dtype) - m, alpha=share)
        if count == 0:
            raise ValueError("there is no update to combine")
        cohort = Bundle(scalars={"clients": float(count), "weight": total})
        return Message({**{group: Bundle(values) for group, values in mean.items()}, "cohort": cohort})


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _check(mean: dict[str, dict[str, Tensor]], update: ClientUpdate) -> None:
    groups = update.message.groups
    if mean.keys() != groups.keys() or any(mean[g].keys() != groups[g].tensors.keys() for g in mean):
        raise ValueError(f"the update of {update.client} has other groups or tensors than the updates before it")
