"""Coordinate-wise median and trimmed mean (Yin et al., arXiv 1803.01498).

    median:        of the n values of a coordinate; of an even number the mean of the middle two
    trimmed mean:  the mean of what is left when the f largest and the f smallest values are dropped

Both ignore how many rows a client has, act on every tensor of every group, and hold one tensor of all clients at a
time beside the updates. On LoRA factors the coordinates are those of A and B, not of their product.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import NonNegativeInt
from torch import Tensor

from fedloom.server.robust.base import Coordinatewise, fold, middle


class Median(Coordinatewise, name="median"):
    """The median of every coordinate."""

    def reduce(self, stacked: Tensor) -> Tensor:
        return middle(stacked.sort(0).values)


class TrimmedMean(Coordinatewise, name="trimmed-mean"):
    """The mean of every coordinate without its extremes."""

    formula: ClassVar[str] = "2 f + 1"

    f: NonNegativeInt = 1
    """Number of values that are dropped at either end; 0 is the plain mean."""

    def least(self) -> int:
        return 2 * self.f + 1

    def reduce(self, stacked: Tensor) -> Tensor:
        return fold(stacked.sort(0).values[self.f : len(stacked) - self.f])
