"""Min-max (Shejwalkar and Houmansadr, NDSS 2021): as far off as the honest clients are from each other.

    u = mu + gamma p,   the largest gamma with  max_i ||u - g_i|| <= max_ij ||g_i - g_j||

g_i the honest updates of the round, mu their mean, p the direction: -mu / ||mu|| (`unit`), -sigma (`std`) or -sign(mu)
(`sign`), sigma the standard deviation of each coordinate.

Differs from the paper in: gamma is not searched by halving. Each condition is a quadratic in gamma,
||p||^2 gamma^2 + 2 <p, mu - g_i> gamma + ||mu - g_i||^2 - D^2 <= 0; gamma is the smallest of their upper roots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedloom import tensors
from fedloom.attacks.base import Attack, Scene, changed, shared, spread
from fedloom.types import ClientUpdate, Tensors


class MinMax(Attack, name="min-max"):
    """The furthest point in a direction that is no further from any honest update than they are from each other."""

    omniscient: ClassVar[bool] = True

    direction: Literal["unit", "std", "sign"] = "std"
    """p: against the mean, against the standard deviation, or against the signs of the mean."""

    def forged(self, own: ClientUpdate, honest: Sequence[ClientUpdate], scene: Scene) -> ClientUpdate:
        moments = {name: spread(honest, name) for name in shared(own)}
        mean = {name: first for name, (first, _) in moments.items()}
        away = self.away(mean, {name: second for name, (_, second) in moments.items()})
        gamma = largest(mean, away, [_double(shared(update)) for update in honest])
        return changed(own, lambda name, t: mean[name] + gamma * away[name])

    def away(self, mean: Mapping[str, Tensor], deviation: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return p."""
        if self.direction == "std":
            return tensors.scale(deviation, -1.0)
        if self.direction == "sign":
            return {name: -torch.sign(t) for name, t in mean.items()}
        length = tensors.norm(mean)
        return tensors.scale(mean, -1 / length if length else 0.0)


def largest(mean: Tensors, away: Tensors, honest: Sequence[Tensors]) -> float:
    """Return the largest gamma for which mean + gamma away is no further from any update than they are apart."""
    most = max((float(tensors.sq_dist(a, b)) for a, b in combinations(honest, 2)), default=0.0)
    square = float(tensors.sq_dist(away, tensors.zeros_like(away)))
    if square == 0:
        return 0.0
    roots = []
    for one in honest:
        offset = tensors.sub(mean, one)
        half = math.fsum(float((away[name] * offset[name]).sum()) for name in away)
        room = most - float(tensors.sq_dist(mean, one))
        roots.append((math.sqrt(max(0.0, half * half + square * room)) - half) / square)
    return max(0.0, min(roots))


def _double(params: Tensors) -> dict[str, Tensor]:
    return {name: t.double() for name, t in params.items()}
