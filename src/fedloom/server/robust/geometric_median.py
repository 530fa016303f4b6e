"""Geometric median, RFA (Pillutla et al., arXiv 1912.13445).

    v = argmin sum_k ||v - u_k||,  by smoothed Weiszfeld steps:
    beta_k = 1 / max(nu, ||v - u_k||),   v <- sum_k beta_k u_k / sum_k beta_k

The weights of the last step are found on the shared weights and hold for every group. Half of the clients may be
anywhere.

Differs from the paper in: every client counts the same, however many rows it has; the steps begin at the
coordinate-wise median instead of the mean, which one far client could put out of reach of a few steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import PositiveFloat, PositiveInt

from fedloom.server.aggregate import Around, wide
from fedloom.server.robust.base import Choice, Chooser, mean, middle, shared, sq_apart
from fedloom.types import ClientUpdate


class GeometricMedian(Chooser, name="geometric-median"):
    """The point of the smallest summed distance to all updates."""

    iterations: PositiveInt = 8
    """Weiszfeld steps."""
    nu: PositiveFloat = 1e-6
    """Smallest distance that counts, so that no client gets an infinite weight."""

    def choose(self, held: Sequence[ClientUpdate], around: Around) -> Choice:
        deltas = shared(held)
        at = {name: middle(torch.stack([wide(d[name]) for d in deltas]).sort(0).values) for name in deltas[0]}
        weights: list[float] = []
        for _ in range(self.iterations):
            weights = [1 / max(self.nu, math.sqrt(sq_apart(at, delta))) for delta in deltas]
            at = dict(mean(held, weights, around)["params"].tensors)
        return Choice(weights)
