"""LoRA-FAIR (Bian et al., arXiv 2411.14961): the mean B is corrected so that its product with the mean A fits better.

    server:    A = sum_k p_k A_k,  B = sum_k p_k B_k,   W = sum_k p_k B_k A_k
               D minimises a distance of (B + D) A from W, and lambda times the size of D
    client k:  starts from A and B + D

`lora-fair` takes 1/2 ||W - (B + D) A||_F^2 + lambda/2 ||D||_F^2, with the minimum

    D = (W - B A) A^T (A A^T + lambda I)^-1

and for lambda = 0 the product W projected on the row space of A. `lora-fair-sgd` takes the paper's distance, see there.
Both need W through W A^T only, and (W - B A) A^T = sum_k p_k (B_k - B) ((A_k - A) A^T), so no d x d matrix is built; it
is exactly zero for one client, and for clients of equal A. The scale s is the same at all clients and cancels.

On the wire: as FedAvg.

Differs from the paper in: the closed form is the default.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from fedloom import factors
from fedloom.algorithms.base import Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.stacking import mean_of, trained_all
from fedloom.factors import Factors
from fedloom.types import Bundle, ClientUpdate, Message, ServerState, Steps, done


class LoraFair(FedAvg, name="lora-fair"):
    """Averaged factors, with B corrected in closed form."""

    needs_lora: ClassVar[bool] = True
    own_combine: ClassVar[str] = "the correction needs every client's factors"
    own_step: ClassVar[str] = "the correction fits the mean factors alone"

    penalty: NonNegativeFloat = 0.01
    """lambda, how much the correction is held back; without bound it is FedAvg."""

    def correction(self, parts: Sequence[Factors], mean: Factors) -> Tensor:
        """Return D of one module, (d_out, r), in float64.

        Args:
            parts: p_k as scale, A_k and B_k of every client.  mean: A and B, scale 1.
        """
        gram = mean.a @ mean.a.mT
        eye = torch.eye(mean.rank, dtype=gram.dtype, device=gram.device)
        # lambda = 0 may leave it singular
        inverse: Tensor = torch.linalg.pinv(gram + self.penalty * eye, hermitian=True)
        return _gap(parts, mean) @ inverse

    def combine(self, server: Server, state: ServerState, updates: Iterable[ClientUpdate]) -> Steps[Message]:
        held = trained_all(self, server, state, updates)
        mean = dict(mean_of(held))
        for module in server.ranks.whole:
            a, b = f"{module}.lora_A", f"{module}.lora_B"
            parts = [Factors(params[a].double(), params[b].double(), p) for p, params in held]
            change = self.correction(parts, Factors(mean[a].double(), mean[b].double()))
            mean[b] = mean[b] + change.to(mean[b].dtype)
        cohort = Bundle(scalars={"clients": float(len(held))})
        return done(Message({"mean": Bundle(mean), "cohort": cohort}))

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        return done(replace(state, round=state.round + 1, params=combined.groups["mean"].tensors))


class LoraFairSgd(LoraFair, name="lora-fair-sgd"):
    """The paper's own distance, 1 - cos(W, (B + D) A) + lambda ||D||, by gradient steps.

    With C = W A^T, G = A A^T, B' = B + D, u = <B', C>, v = <B', B' G>: cos = u / (||W|| sqrt v). The norm of D is not
    smooth at D = 0, where it begins, so a step is one of the proximal gradient: D stays exactly zero where the
    gradient of the cosine does not exceed lambda. Where W or B A is zero the cosine is none, and D = 0.
    """

    steps: PositiveInt = 50
    """Gradient steps a round."""
    lr: PositiveFloat = 0.5
    """Step size, in units of ||B A||^2 / ||A A^T||, so that it does not depend on how large the adapter is."""

    def correction(self, parts: Sequence[Factors], mean: Factors) -> Tensor:
        gram = mean.a @ mean.a.mT
        target = mean.b @ gram + _gap(parts, mean)
        size, begun = factors.norm(factors.stack(parts)), factors.inner(mean, mean)
        change = torch.zeros_like(mean.b)
        if not size or begun <= 0:
            return change
        rate = self.lr * begun / float(torch.linalg.matrix_norm(gram, ord=2))
        for _ in range(self.steps):
            change = change - rate * _slope(mean.b + change, target, gram, size)
            norm = float(torch.linalg.vector_norm(change))
            change = change * max(0.0, 1 - rate * self.penalty / norm) if norm else change
        return change


def _gap(parts: Sequence[Factors], mean: Factors) -> Tensor:
    """Return (W - B A) A^T = sum_k p_k (B_k - B) ((A_k - A) A^T), (d_out, r)."""
    terms = [one.scale * (one.b - mean.b) @ ((one.a - mean.a) @ mean.a.mT) for one in parts]
    return torch.stack(terms).sum(0)


def _slope(b: Tensor, target: Tensor, gram: Tensor, size: float) -> Tensor:
    """Return the gradient of 1 - cos with respect to B'."""
    along = b @ gram
    u, v = float((b * target).sum()), float((b * along).sum())
    return (along * (u / v) - target) / (size * math.sqrt(v))
