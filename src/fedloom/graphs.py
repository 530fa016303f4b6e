"""Graphs of clients that talk to each other, and the weights with which they mix what they hear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedloom.parts import Part


class Graph(Part, family=True):
    """Who is whose neighbour."""

    def edges(self, clients: int, generator: torch.Generator) -> Tensor:
        """Return (n, n) booleans, symmetric and false on the diagonal.

        Args:
            generator: the only source of randomness.
        """
        raise NotImplementedError


class Ring(Graph, name="ring"):
    """Every client talks to the one before and the one after it."""

    def edges(self, clients: int, generator: torch.Generator) -> Tensor:
        near = torch.eye(clients, dtype=torch.bool).roll(1, 0)
        return (near | near.mT).fill_diagonal_(False)


class Complete(Graph, name="complete"):
    """Everybody talks to everybody."""

    def edges(self, clients: int, generator: torch.Generator) -> Tensor:
        return torch.ones(clients, clients, dtype=torch.bool).fill_diagonal_(False)


class ErdosRenyi(Graph, name="erdos-renyi"):
    """Every pair of clients is joined with the same probability, drawn once a run from the seed."""

    p: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Probability of an edge."""

    def edges(self, clients: int, generator: torch.Generator) -> Tensor:
        upper = torch.rand(clients, clients, generator=generator).lt(self.p).triu(1)
        return upper | upper.mT


def components(edges: Tensor) -> Tensor:
    """Return (n,) the smallest index that each node can be reached from."""
    label = torch.arange(len(edges))
    linked = edges | torch.eye(len(edges), dtype=torch.bool)
    while True:
        lower = torch.where(linked, label, len(edges)).amin(1)
        if torch.equal(lower, label):
            return label
        label = lower


def metropolis(edges: Tensor) -> Tensor:
    """Return the mixing matrix Q (n, n) in float64: Q_ij = 1 / (1 + max(deg_i, deg_j)) on edges, rows sum to 1."""
    degrees = edges.sum(1)
    larger = torch.maximum(degrees[:, None], degrees[None])
    q = torch.where(edges, 1 / (1.0 + larger.double()), 0.0)
    return q + torch.diag(1 - q.sum(1))


def lonely(edges: Tensor, names: Sequence[str]) -> list[str]:
    """Return the nodes that the first one cannot reach; empty: the graph is connected."""
    return [name for name, label in zip(names, components(edges).tolist(), strict=True) if label != 0]
