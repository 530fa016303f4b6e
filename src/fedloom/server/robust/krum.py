"""Krum and multi-Krum (Blanchard et al., arXiv 1703.02757).

    score_k = sum of ||u_k - u_j||^2 over the n - f - 2 clients j nearest to k
    Krum:        the update of the smallest score
    multi-Krum:  the mean of the m updates of the smallest scores

Both ignore how many rows a client has, and need n >= 2 f + 3 updates. The choice is made on the shared weights and
holds for every group. With LoRA, `distance: product` compares what the factors stand for.

Differs from the paper in: equal scores are told apart by the summed distance to all others, so the order of clients
does not matter; m is n - f unless set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from pydantic import PositiveInt

from fedloom.server.aggregate import Around
from fedloom.server.robust.base import Choice
from fedloom.server.robust.distances import ByDistance, ranking
from fedloom.types import ClientUpdate


class Krum(ByDistance, name="krum"):
    """The one update that has the nearest neighbours."""

    formula: ClassVar[str] = "2 f + 3"

    def least(self) -> int:
        return 2 * self.f + 3

    def choose(self, held: Sequence[ClientUpdate], around: Around) -> Choice:
        chosen = set(ranking(self.distances(held, around), self.f)[: self.count(len(held))])
        return Choice([float(k in chosen) for k in range(len(held))])

    def count(self, clients: int) -> int:
        """Return how many of so many updates are averaged."""
        return 1


class MultiKrum(Krum, name="multi-krum"):
    """The mean of the updates that have the nearest neighbours."""

    m: PositiveInt | None = None
    """Number of updates that are averaged; null: all but f."""

    def conflicts(self, clients: int) -> Iterable[str]:
        yield from super().conflicts(clients)
        if self.m is not None and self.m > clients:
            yield (
                f"server.aggregator.m={self.m}: the sampler picks {clients} clients a round; allowed: 1 to {clients}, "
                "or null for all but f"
            )

    def count(self, clients: int) -> int:
        return min(clients, clients - self.f if self.m is None else self.m)
