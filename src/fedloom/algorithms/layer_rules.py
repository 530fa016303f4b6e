"""Which layers a client trains: rules for `selective`.

A rule gives every client exactly as many layers as its budget allows. Rules that score layers look at the gradient of
the adapter; the others go by the layers' places alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from fedloom import tensors
from fedloom.parts import Part
from fedloom.types import Tensors

SWEEPS = 100
"""Passes over all clients after which the ascent ends where it is."""
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|block|h)\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """Return the index of the decoder layer in a live name; None: the tensor is outside all layers."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def layers_of(params: Tensors) -> list[int]:
    """Return the indices of the layers that an adapter is in, in ascending order."""
    return sorted({layer for name in params if (layer := layer_of(name)) is not None})


def of_layer(params: Tensors, layer: int) -> Tensors:
    """Return the tensors of one layer."""
    return {name: t for name, t in params.items() if layer_of(name) == layer}


@dataclass(frozen=True, slots=True)
class Asked:
    """What layers are chosen from, and how many.

    Attributes:
        budgets: of each client, at least 1; more than there are layers: all.
        layers: how many there are.
        scores: (clients, layers) float64, for rules that score.
        stream: the random stream of the round.
    """

    budgets: Sequence[int]
    layers: int
    scores: Tensor
    stream: torch.Generator


class LayerRule(Part, family=True):
    """Chooses layers."""

    scored: ClassVar[bool] = False
    """Whether it needs the clients' scores."""

    def score(self, gradient: Tensors, params: Tensors) -> float:
        """Return the score of one layer from its gradient and its tensors."""
        raise NotImplementedError

    def masks(self, asked: Asked) -> Tensor:
        """Return (clients, layers) bool: what each client trains."""
        return torch.stack([_mask(self.places(asked, budget), asked.layers) for budget in asked.budgets])

    def places(self, asked: Asked, budget: int) -> list[int]:
        """Return which layers, numbered from the input, a client of this budget trains."""
        raise NotImplementedError


class Top(LayerRule, name="top"):
    """The layers next to the output."""

    def places(self, asked: Asked, budget: int) -> list[int]:
        return list(range(asked.layers))[-budget:]


class Bottom(LayerRule, name="bottom"):
    """The layers next to the input."""

    def places(self, asked: Asked, budget: int) -> list[int]:
        return list(range(asked.layers))[:budget]


class Both(LayerRule, name="both"):
    """Half of the budget next to the input, the rest next to the output."""

    def places(self, asked: Asked, budget: int) -> list[int]:
        every, low = list(range(asked.layers)), min(budget, asked.layers) // 2
        return every[:low] + every[low:][-(budget - low) :]


class Random(LayerRule, name="random"):
    """Layers drawn anew for every client and round."""

    def places(self, asked: Asked, budget: int) -> list[int]:
        drawn: list[int] = torch.randperm(asked.layers, generator=asked.stream)[:budget].tolist()
        return drawn


class Full(LayerRule, name="full"):
    """All layers, whatever the budget."""

    def places(self, asked: Asked, budget: int) -> list[int]:
        return list(range(asked.layers))


class GradientNorm(LayerRule, name="gradient-norm"):
    """The layers with the largest gradients, chosen with an eye on what the others choose."""

    scored: ClassVar[bool] = True

    lam: NonNegativeFloat = 0.1
    """lambda, in units of the mean score: the price of every layer and other client that differ; 0: each client's own
    largest."""

    def score(self, gradient: Tensors, params: Tensors) -> float:
        return tensors.norm(gradient)

    def masks(self, asked: Asked) -> Tensor:
        return agreed(asked.scores, asked.budgets, self.lam * float(asked.scores.mean()))


class Rgn(GradientNorm, name="rgn"):
    """The layers with the largest ratio of gradient norm to norm of the adapter's own tensors."""

    def score(self, gradient: Tensors, params: Tensors) -> float:
        return tensors.norm(gradient) / max(tensors.norm(params), torch.finfo(torch.float32).tiny)


def agreed(scores: Tensor, budgets: Sequence[int], price: float) -> Tensor:
    """Return masks m (clients, layers) with sum_l m_kl = R_k that make the objective large, by coordinate ascent.

    The ascent changes one client at a time to its best mask given the others'. It starts from every client's own best
    layers and from the layers that are best in sum; the better end is taken.

    Args:
        scores: g, (clients, layers).  budgets: R.  price: lambda.
    """
    common = scores.sum(0).expand_as(scores)
    ends = [_ascended(scores, budgets, price, _best(start, budgets)) for start in (scores, common)]
    return max(ends, key=lambda masks: objective(scores, masks, price))


def objective(scores: Tensor, masks: Tensor, price: float) -> float:
    """Return sum_kl m_kl g_kl - price sum_{j<k} ||m_k - m_j||_1."""
    # at each layer, every client that has it differs from every client that has it not
    having = masks.sum(0).to(scores.dtype)
    return float((scores * masks).sum() - price * (having * (len(scores) - having)).sum())


def _ascended(scores: Tensor, budgets: Sequence[int], price: float, masks: Tensor) -> Tensor:
    having, others = masks.sum(0), len(scores) - 1
    for _ in range(SWEEPS):
        moved = False
        for k, budget in enumerate(budgets):
            beside = having - masks[k].int()
            gains = scores[k] - price * (others - 2 * beside)
            (new,) = _best(gains[None], [budget])
            if float(gains[new].sum()) > float(gains[masks[k]].sum()):
                masks[k], having, moved = new, beside + new.int(), True
        if not moved:
            break
    return masks


def _best(values: Tensor, budgets: Sequence[int]) -> Tensor:
    """Return each row's largest values as a mask; of equal ones those of the lower layers."""
    orders = torch.argsort(values, dim=1, descending=True, stable=True).tolist()
    rows = zip(orders, budgets, strict=True)
    return torch.stack([_mask(order[:budget], values.shape[1]) for order, budget in rows])


def _mask(places: Sequence[int], layers: int) -> Tensor:
    mask = torch.zeros(layers, dtype=torch.bool)
    mask[list(places)] = True
    return mask
