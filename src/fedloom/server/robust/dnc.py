"""Divide and conquer, DnC (Shejwalkar and Houmansadr, NDSS 2021).

    several times:  X = the updates at some random coordinates, centred;  v = its top right singular vector
                    s_k = <X_k, v>^2;  the floor(c f) clients of the largest s_k are dropped
    result          the mean of those that were never dropped

The choice is made on the shared weights and holds for every group; the number of rows plays no part. n must exceed 2 f
and what can be dropped at most.

Differs from the paper in: never more coordinates than there are, and then all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from fedloom.server.aggregate import Around
from fedloom.server.robust.base import Choice, Chooser, shared
from fedloom.types import ClientUpdate, Tensors


class DnC(Chooser, name="dnc"):
    """The mean without the clients that stand out along the direction in which updates differ most."""

    formula: ClassVar[str] = "more than 2 f and than iterations floor(c f)"

    f: NonNegativeInt = 1
    """Number of clients of a cohort that may misbehave."""
    iterations: PositiveInt = 1
    """Times that clients are dropped."""
    c: PositiveFloat = 1.0
    """How many clients are dropped each time, in multiples of f."""
    coordinates: PositiveInt = 10_000
    """Coordinates that are looked at each time."""

    def least(self) -> int:
        return max(2 * self.f, self.iterations * self.dropped()) + 1

    def dropped(self) -> int:
        """Return how many clients are dropped each time."""
        return int(self.c * self.f + 1e-9)

    def choose(self, held: Sequence[ClientUpdate], around: Around) -> Choice:
        deltas, good = shared(held), torch.ones(len(held), dtype=torch.bool)
        size = sum(t.numel() for t in deltas[0].values())
        for _ in range(self.iterations):
            where = torch.arange(size)
            if self.coordinates < size:
                where = torch.randperm(size, generator=around.stream)[: self.coordinates].sort().values
            outlying = outliers(torch.stack([_at(delta, where) for delta in deltas]))
            good[outlying.sort(stable=True).indices[len(held) - self.dropped() :]] = False
        return Choice(good.double().tolist())


def outliers(rows: Tensor) -> Tensor:
    """Return the squared projection of every centred row on the top right singular vector, (n,).

    Args:
        rows: (n, b).
    """
    centred = rows - rows.mean(0)
    # the projections U S of all rows come from the n x n Gram matrix, without the (b, b) side
    squares, vectors = torch.linalg.eigh(centred @ centred.mT)
    found: Tensor = squares[-1].clamp(min=0) * vectors[:, -1].square()
    return found


def _at(delta: Tensors, where: Tensor) -> Tensor:
    flat = torch.cat([delta[name].flatten() for name in sorted(delta)])
    return flat[where.to(flat.device)].double()
