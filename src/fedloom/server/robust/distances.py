"""Distances between clients, on the factors that were sent or on the products that they stand for.

Two clients may hold the same product s B A in different bases, (B G^-1, G A): their factors are then far apart, their
products are not. `product` compares ||s B_1 A_1 - s B_2 A_2||_F over all modules, from r x r matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Literal

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from fedloom import factors, tensors
from fedloom.factors import Factors
from fedloom.server.aggregate import Around
from fedloom.server.robust.base import Chooser, shared, sq_apart
from fedloom.types import ClientUpdate, RecipeError


class ByDistance(Chooser):
    """A rule that looks at how far the clients are from each other."""

    f: NonNegativeInt = 1
    """Number of clients of a cohort that may misbehave."""
    distance: Literal["factors", "product"] = "factors"
    """What is compared: the changes as they were sent, or the products of the LoRA factors that result."""

    @property
    def products(self) -> bool:
        return self.distance == "product"

    def distances(self, held: Sequence[ClientUpdate], around: Around) -> Tensor:
        """Return the squared distances of all pairs, (n, n) in float64."""
        if self.products:
            adapters = trained(held, around)
            return _pairwise(len(held), lambda i, j: factors.sq_distance(adapters[i], adapters[j]))
        deltas = shared(held)
        return _pairwise(len(held), lambda i, j: sq_apart(deltas[i], deltas[j]))


def trained(held: Sequence[ClientUpdate], around: Around) -> list[dict[str, Factors]]:
    """Return the factors that every client ended with.

    Raises:
        RecipeError: the shared weights are no LoRA factors, or are not sent as whole pairs.
    """
    deltas, hint = shared(held), "set server.aggregator.distance=factors"
    if around.scale is None:
        raise RecipeError(f"server.aggregator.distance=product compares LoRA factors, and there are none; {hint}")
    if any(delta.keys() != around.params.keys() for delta in deltas):
        raise RecipeError(
            "server.aggregator.distance=product needs both factors of every module, and the algorithm sends only some "
            f"of the shared weights; {hint}"
        )
    try:
        return [factors.pairs(tensors.add(around.params, delta), around.scale) for delta in deltas]
    except ValueError as error:
        raise RecipeError(f"server.aggregator.distance=product: {error}; {hint}") from error


def scores(apart: Tensor, f: int) -> Tensor:
    """Return Krum's scores: the sum of every client's n - f - 2 smallest squared distances (of one, if that is less).

    Args:
        apart: (n, n) squared distances.
    """
    n = len(apart)
    others = apart[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)
    return others.sort(1).values[:, : max(1, n - f - 2)].sum(1)


def ranking(apart: Tensor, f: int) -> list[int]:
    """Return the clients by score, best first; of equal scores the one nearer to all the others, then the earlier."""
    score, total = scores(apart, f).tolist(), apart.sort(1).values.sum(1).tolist()
    return sorted(range(len(apart)), key=lambda k: (score[k], total[k]))


def _pairwise(n: int, apart: Callable[[int, int], float]) -> Tensor:
    found = torch.zeros(n, n, dtype=torch.float64)
    for i, j in combinations(range(n), 2):
        found[i, j] = found[j, i] = apart(i, j)
    return found
