"""What the robust rules share: all updates of a round are held at once, and every client counts the same.

A rule either chooses: it looks at the shared weights (group `params`) and gives every client a weight, with which all
groups are averaged; or it acts on each coordinate of every group by itself. The number of training rows, which a client
tells itself, plays no part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedloom.server.aggregate import Aggregator, Around, Mean, bundles, check, values, wide
from fedloom.types import Bundle, ClientUpdate, Message, RecipeError, Stopped, Tensors


@dataclass(frozen=True, slots=True)
class Choice:
    """What a chooser decided.

    Attributes:
        weights: of each update, not all zero; only their proportions matter.
        kept: what it needs in the next round.
    """

    weights: Sequence[float]
    kept: Bundle = field(default_factory=Bundle)


class Robust(Aggregator):
    """A rule that sees all updates of a round."""

    formula: ClassVar[str] = ""
    """The formula of `least`, as a person reads it; empty: any number of updates will do."""

    def least(self) -> int:
        """Return the smallest number of updates that it can combine."""
        return 1

    def conflicts(self, clients: int) -> Iterable[str]:
        if clients < self.least():
            yield (
                f"{self._need()} and the sampler picks {clients}; lower server.aggregator.f, or raise sampler.count, "
                "sampler.fraction or data.clients"
            )

    def combine(self, updates: Iterable[ClientUpdate], around: Around) -> Message:
        held = list(updates)
        if not held:
            raise ValueError("there is no update to combine")
        if len(held) < self.least():
            raise Stopped(
                f"{self._need()} and {len(held)} came that are finite; the state before this round is saved. Lower "
                "server.aggregator.f or sample more clients, then start anew"
            )
        first = values(held[0])
        for update in held[1:]:
            check(first, values(update), update.client)
        combined, kept = self.rule(held, around)
        weight = math.fsum(update.weight for update in held)
        groups = dict(combined)
        groups["cohort"] = Bundle(scalars={"clients": float(len(held)), "weight": weight})
        return Message({**groups, "aggregator": kept} if kept != Bundle() else groups)

    def rule(self, held: Sequence[ClientUpdate], around: Around) -> tuple[dict[str, Bundle], Bundle]:
        """Return the combined groups, and what is needed in the next round.

        Args:
            held: all updates; they have the same values.
        """
        raise NotImplementedError

    def _need(self) -> str:
        return f"server.aggregator={self.part_name} needs at least {self.least()} updates a round ({self.formula})"


class Chooser(Robust):
    """A rule that weighs clients by their shared weights."""

    def choose(self, held: Sequence[ClientUpdate], around: Around) -> Choice:
        """Return the weight of every update."""
        raise NotImplementedError

    def rule(self, held: Sequence[ClientUpdate], around: Around) -> tuple[dict[str, Bundle], Bundle]:
        choice = self.choose(held, around)
        return mean(held, choice.weights, around), choice.kept


class Coordinatewise(Robust):
    """A rule that acts on every coordinate by itself, one tensor at a time."""

    def reduce(self, stacked: Tensor) -> Tensor:
        """Return what becomes of one value of all clients, stacked in their order: (n, ...) to (...)."""
        raise NotImplementedError

    def rule(self, held: Sequence[ClientUpdate], around: Around) -> tuple[dict[str, Bundle], Bundle]:
        return by_coordinate(held, self.reduce), Bundle()


def shared(held: Sequence[ClientUpdate]) -> list[Tensors]:
    """Return the shared weights' change of every client.

    Raises:
        RecipeError: the algorithm sends none.
    """
    if any("params" not in update.message.groups for update in held):
        raise RecipeError(
            "server.aggregator: the algorithm sends no shared weights (group params), by which clients are compared; "
            "set server.aggregator=median, trimmed-mean or mean"
        )
    return [update.message.groups["params"].tensors for update in held]


def mean(held: Sequence[ClientUpdate], weights: Sequence[float], around: Around) -> dict[str, Bundle]:
    """Return the weighted mean of every group."""
    counted = (replace(update, weight=w) for update, w in zip(held, weights, strict=True) if w > 0)
    combined = Mean().combine(counted, around).groups
    return {group: bundle for group, bundle in combined.items() if group != "cohort"}


def by_coordinate(held: Sequence[ClientUpdate], reduce: Callable[[Tensor], Tensor]) -> dict[str, Bundle]:
    """Return every group after `reduce` (n, ...) -> (...) has acted on each of its values, in at least float32."""
    every = [values(update) for update in held]
    found = {slot: reduce(torch.stack([wide(one[slot]) for one in every])) for slot in every[0]}
    return bundles(found, held[0].message.groups)


def fold(rows: Tensor) -> Tensor:
    """Return the mean over the first dimension; of equal rows exactly that row."""
    running = rows[0].clone()
    for k, row in enumerate(rows[1:], 2):
        running += (row - running) / k
    return running


def middle(ordered: Tensor) -> Tensor:
    """Return the median over the first dimension of sorted rows; of an even number the mean of the middle two."""
    n = len(ordered)
    return torch.lerp(ordered[(n - 1) // 2], ordered[n // 2], 0.5)


def times(update: ClientUpdate, factor: float) -> ClientUpdate:
    """Return an update whose every value is multiplied."""
    found = {slot: wide(t) * factor for slot, t in values(update).items()}
    return replace(update, message=Message(bundles(found, update.message.groups)))


def sq_apart(a: Tensors, b: Tensors) -> float:
    """Return ||a - b||^2 over all tensors in float64, in which no two float32 values are too far apart."""
    return math.fsum(float((a[name].double() - b[name].double()).square().sum()) for name in a)
