"""Bulyan (El Mhamdi et al., arXiv 1802.07927): Krum's choice, then a trimmed mean around the median.

    select:   theta = n - 2 f clients, one after another the best of those left by Krum's score
    combine:  of every coordinate the mean of the theta - 2 f selected values nearest to their median

It ignores how many rows a client has and needs n >= 4 f + 3 updates. The selection is made on the shared weights; the
second step acts on every tensor of every group.

Differs from the paper in: a score counts at least one neighbour where the clients left are so few that there would be
none; of two values as near to the median the smaller one counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from fedloom.server.aggregate import Around
from fedloom.server.robust.base import Choice, by_coordinate, fold, middle
from fedloom.server.robust.distances import ByDistance, ranking
from fedloom.types import Bundle, ClientUpdate


class Bulyan(ByDistance, name="bulyan"):
    """Krum's choice of clients, then the values nearest to their median."""

    formula: ClassVar[str] = "4 f + 3"

    def least(self) -> int:
        return 4 * self.f + 3

    def choose(self, held: Sequence[ClientUpdate], around: Around) -> Choice:
        apart, left = self.distances(held, around), list(range(len(held)))
        while len(left) > 2 * self.f:
            left.pop(ranking(apart[left][:, left], self.f)[0])
        return Choice([float(k not in left) for k in range(len(held))])

    def rule(self, held: Sequence[ClientUpdate], around: Around) -> tuple[dict[str, Bundle], Bundle]:
        weights = self.choose(held, around).weights
        chosen = [update for update, w in zip(held, weights, strict=True) if w]
        return by_coordinate(chosen, self.reduce), Bundle()

    def reduce(self, stacked: Tensor) -> Tensor:
        """Return the mean of the values nearest to the median, all but 2 f of them."""
        ordered = stacked.sort(0).values
        nearest = (ordered - middle(ordered)).abs().sort(dim=0, stable=True).indices[: len(stacked) - 2 * self.f]
        return fold(ordered.gather(0, nearest))
