"""FoolsGold (Fung et al., arXiv 1808.04866): clients that push in one direction round after round count less.

    h_k  = sum of all updates of client k so far,   cs_kj = cosine of h_k and h_j
    v_k  = max(0, max_j cs_kj);   where v_k < v_j:  cs_kj <- cs_kj v_k / v_j        (pardoning)
    a_k  = 1 - max(0, max_j cs_kj),   a <- a / max a,   1 -> 0.99
    a_k <- ln(a_k / (1 - a_k)) + 1/2, cut to [0, 1]
    result  sum_k a_k u_k / sum_k a_k

The weights are found on the shared weights and hold for every group; the number of rows plays no part. The server keeps
h_k of every client that it has seen, N times the shared weights.

Differs from the paper in: all coordinates count alike in the cosine; where no client is left with a weight (all push in
one direction) all count the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fedloom import tensors
from fedloom.server.aggregate import Around, wide
from fedloom.server.robust.base import Choice, Chooser, shared
from fedloom.types import Bundle, ClientUpdate, Tensors

ROUNDING = 1e-12
"""What a cosine of 1 may lack."""


class FoolsGold(Chooser, name="foolsgold"):
    """The mean, in which clients of similar histories share one voice."""

    remembers: ClassVar[bool] = True

    def choose(self, held: Sequence[ClientUpdate], around: Around) -> Choice:
        names = [update.client for update in held]
        histories = [_longer(around.kept, *both) for both in zip(names, shared(held), strict=True)]
        new = {f"{c}/{n}": t for c, h in zip(names, histories, strict=True) for n, t in h.items()}
        return Choice(weights(_cosines(histories)), Bundle({**around.kept.tensors, **new}))


def weights(cosines: Tensor) -> list[float]:
    """Return what every client counts.

    Args:
        cosines: (n, n) of the histories, zero on the diagonal.
    """
    most = cosines.max(1).values.clamp(min=0)
    pardoned = cosines * torch.where(most[:, None] < most[None], most[:, None] / most[None], 1.0)
    alone = 1 - pardoned.max(1).values.clamp(0, 1)
    if float(alone.max()) < ROUNDING:
        return [1.0] * len(cosines)
    share = alone / alone.max()
    share = torch.where(share == 1, 0.99, share)
    found: list[float] = (torch.logit(share) + 0.5).clamp(0, 1).tolist()
    return found


def _longer(kept: Bundle, client: str, delta: Tensors) -> dict[str, Tensor]:
    before = {name: kept.tensors.get(f"{client}/{name}") for name in delta}
    return {n: wide(t) if (old := before[n]) is None else old.to(t.device) + t for n, t in delta.items()}


def _cosines(histories: Sequence[Tensors]) -> Tensor:
    lengths = [tensors.norm(one) for one in histories]
    found = torch.zeros(len(histories), len(histories), dtype=torch.float64)
    for i, x in enumerate(histories):
        for j, y in enumerate(histories[:i]):
            product = sum(float((x[n].double() * y[n].double()).sum()) for n in x)
            size = lengths[i] * lengths[j]
            found[i, j] = found[j, i] = product / size if size else 0.0
    return found
