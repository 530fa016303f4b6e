"""Embeddings as points: centres of a client's, how well some points cover others, and the nearest ones.

    cov(D, P) = 1/|D| sum_{d in D} max_{p in P} cos(d, p)

All vectors are brought to length 1. With -1 for an empty P, cov is a facility-location function: what a point adds to
it never grows when P does.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

ITERATIONS = 50
CHUNK = 1024
"""Rows that are compared with all others at a time."""


def units(points: Tensor) -> Tensor:
    """Return (n, d) vectors of length 1 in float32."""
    return functional.normalize(points.float(), dim=1)


def centres(points: Tensor, count: int) -> Tensor:
    """Return (at most count, d) centres of k-means over unit vectors, each of length 1.

    It starts from the point nearest to the mean and then, one by one, the point farthest from all so far, so nothing is
    drawn. A centre without points stays where it is.
    """
    points = units(points)
    chosen = [int((points @ points.mean(0)).argmax())]
    near = points @ points[chosen[0]]
    while len(chosen) < min(count, len(points)):
        chosen.append(int(near.argmin()))
        near = torch.maximum(near, points @ points[chosen[-1]])
    found = points[chosen]
    owner = torch.full((len(points),), -1)
    for _ in range(ITERATIONS):
        nearest = (points @ found.mT).argmax(1)
        if torch.equal(nearest, owner):
            break
        owner = nearest
        sums = torch.zeros_like(found).index_add_(0, owner, points)
        held = torch.bincount(owner, minlength=len(found)) > 0
        found = torch.where(held[:, None], units(sums), found)
    return found


def covered(domain: Tensor, points: Tensor) -> float:
    """Return cov(domain, points)."""
    if not len(points):
        return -1.0
    best = [(part @ points.mT).amax(1) for part in units(domain).split(CHUNK)]
    return float(torch.cat(best).double().mean())


def one_each(candidates: Sequence[Tensor]) -> tuple[list[int], list[float]]:
    """Choose one candidate of every owner so that they cover all candidates, by greedy steps.

    Each step takes the candidate that adds most to the coverage, of any owner that has none yet; so gains never grow.
    Gains are looked up lazily: one that is stale can only have been larger.

    Args:
        candidates: an owner -> (n, d) unit vectors, at least one.

    Returns:
        Each owner's chosen candidate; the gain of every step, in the order of the steps.
    """
    domain = torch.cat(list(candidates))
    best = torch.full((len(domain),), -1.0)
    places = [(owner, i) for owner, own in enumerate(candidates) for i in range(len(own))]

    def gain(owner: int, i: int) -> float:
        return float((domain @ candidates[owner][i] - best).clamp(min=0).double().mean())

    # equal gains go by client order
    queue = [(-gain(owner, i), owner, i, 0) for owner, i in places]
    heapq.heapify(queue)
    chosen: dict[int, int] = {}
    gains: list[float] = []
    while len(chosen) < len(candidates):
        negative, owner, i, seen = heapq.heappop(queue)
        if owner in chosen:
            continue
        if seen < len(chosen):
            heapq.heappush(queue, (-gain(owner, i), owner, i, len(chosen)))
            continue
        chosen[owner] = i
        gains.append(-negative)
        best = torch.maximum(best, domain @ candidates[owner][i])
    return [chosen[owner] for owner in range(len(candidates))], gains


def nearest_each(points: Sequence[Tensor], stock: Tensor, count: int) -> list[list[int]]:
    """Return for each point the `count` rows of the stock nearest to it that no point before it has taken."""
    stock, taken = units(stock), []
    free = torch.ones(len(stock), dtype=torch.bool)
    for point in points:
        near = (stock @ point).masked_fill(~free, -torch.inf)
        own: list[int] = torch.argsort(near, descending=True, stable=True)[: min(count, int(free.sum()))].tolist()
        free[own] = False
        taken.append(own)
    return taken
