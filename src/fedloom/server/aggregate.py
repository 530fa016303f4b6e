"""How a cohort's updates become one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeAlias

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

    Every value of every group is combined: tensors, and numbers as tensors without dimensions are. Group `cohort` of
    the result holds as scalars how many `clients` there were and their summed `weight`; what must outlive the round
    goes into group `aggregator`.
    """

    remembers: ClassVar[bool] = False
    """Whether it compares with earlier rounds, so that the weights must stay in one basis."""

    def conflicts(self, clients: int) -> Iterable[str]:
        """Yield why it cannot combine the updates of so many clients, one sentence each."""
        return ()

    @property
    def products(self) -> bool:
        """Whether it compares products of LoRA factors, so that other adapters are refused."""
        return False

    def combine(self, updates: Iterable[ClientUpdate], around: Around) -> Message:
        """Combine updates, which come in client order.

        Raises:
            ValueError: there is no update, updates differ in their groups, names or shapes, or hold texts.
        """
        raise NotImplementedError


class Mean(Aggregator, name="mean"):
    """The weighted mean of every value, folded one update at a time, so one update is in memory.

    The mean is updated as m <- m + w/W (x - m) with W the weight so far, in at least float32: equal updates give
    exactly themselves, and one update gives exactly itself.
    """

    def combine(self, updates: Iterable[ClientUpdate], around: Around) -> Message:
        mean: Values = {}
        total, count = 0.0, 0
        for update in updates:
            total, count = total + update.weight, count + 1
            new = values(update)
            if count == 1:
                mean = {slot: wide(t).clone() for slot, t in new.items()}
                groups = tuple(update.message.groups)
                continue
            check(mean, new, update.client)
            share = update.weight / total
            for slot, t in new.items():
                m = mean[slot]
                m.add_(t.to(m.dtype) - m, alpha=share)
        if count == 0:
            raise ValueError("there is no update to combine")
        cohort = Bundle(scalars={"clients": float(count), "weight": total})
        return Message({**bundles(mean, groups), "cohort": cohort})


class Slot(NamedTuple):
    """Where a value of a message stands."""

    group: str
    name: str
    scalar: bool = False


Values: TypeAlias = dict[Slot, Tensor]


def values(update: ClientUpdate) -> Values:
    """Return all that an update holds; numbers are float64 tensors without dimensions.

    Raises:
        ValueError: it holds texts, which have no mean.
    """
    found: Values = {}
    for group, bundle in update.message.groups.items():
        if bundle.texts:
            raise ValueError(f"the update of {update.client} has texts in group {group}, which cannot be combined")
        found |= {Slot(group, name): t for name, t in bundle.tensors.items()}
        for name, number in bundle.scalars.items():
            found[Slot(group, name, scalar=True)] = torch.tensor(number, dtype=torch.float64)
    return found


def bundles(found: Mapping[Slot, Tensor], groups: Iterable[str]) -> dict[str, Bundle]:
    """Return values as the groups of a message, empty ones included."""
    named: dict[str, Bundle] = {}
    for group in groups:
        own = {slot: t for slot, t in found.items() if slot.group == group}
        held = {slot.name: t for slot, t in own.items() if not slot.scalar}
        named[group] = Bundle(held, {slot.name: float(t) for slot, t in own.items() if slot.scalar})
    return named


def wide(t: Tensor) -> Tensor:
    """Return a tensor in at least float32."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def check(first: Values, new: Values, client: str) -> None:
    """Raise a ValueError if the update of a client has other values than those before it."""
    if first.keys() != new.keys():
        raise ValueError(f"the update of {client} has other groups or names than the updates before it")
    if odd := [slot for slot in new if new[slot].shape != first[slot].shape]:
        slot = odd[0]
        raise ValueError(
            f"the update of {client} has {slot.group}/{slot.name} of shape {tuple(new[slot].shape)}, "
            f"the updates before it {tuple(first[slot].shape)}"
        )
