"""Local optimisers and learning-rate schedules over rounds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt

from fedloom.parts import Part

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Part, family=True):
    """The optimiser of a client's local steps, built afresh in every round."""

    def build(self, params: Iterable[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """Return a torch optimiser over `params` with learning rate `lr`."""
        raise NotImplementedError


class AdamW(Optimizer, name="adamw"):
    """AdamW (arXiv 1711.05101)."""

    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: NonNegativeFloat = 0.0

    def build(self, params: Iterable[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
        betas = (self.beta1, self.beta2)
        return torch.optim.AdamW(params, lr=lr, betas=betas, eps=self.eps, weight_decay=self.weight_decay, fused=True)


class Sgd(Optimizer, name="sgd"):
    """Stochastic gradient descent, with heavy-ball momentum where asked."""

    momentum: Fraction = 0.0
    weight_decay: NonNegativeFloat = 0.0

    def build(self, params: Iterable[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=lr, momentum=self.momentum, weight_decay=self.weight_decay)


class Schedule(Part, family=True):
    """The learning rate's factor, constant within a round."""

    def factor(self, round_: int, rounds: int) -> float:
        """Return the factor of round `round_` (from 0) out of `rounds`."""
        raise NotImplementedError


class Constant(Schedule, name="constant"):
    """The same learning rate in every round."""

    def factor(self, round_: int, rounds: int) -> float:
        return 1.0


class WarmUp(Schedule, name="warm-up"):
    """Linear warm-up over the first rounds, then constant."""

    warmup: NonNegativeInt = 3
    """Rounds of warm-up: round t < warmup has the factor (t + 1) / (warmup + 1)."""

    def factor(self, round_: int, rounds: int) -> float:
        return min(1.0, (round_ + 1) / (self.warmup + 1))


class Cosine(WarmUp, name="cosine"):
    """Linear warm-up, then half a cosine that would reach `floor` in the round after the last: no round is wasted."""

    warmup: NonNegativeInt = 0
    """Rounds of warm-up."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Factor at which the curve ends."""

    def factor(self, round_: int, rounds: int) -> float:
        if round_ < self.warmup:
            return super().factor(round_, rounds)
        share = (round_ - self.warmup) / max(1, rounds - self.warmup)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
