"""q-FedAvg (Li et al., arXiv 1905.10497): clients with a higher loss count more, for a more even loss.

    minimise   sum_k F_k(w)^{q+1} / (q+1)
    client k:  F_k = its mean training loss at w;  D_k = w_k - w after local steps;  L = 1 / eta
               up F_k^q D_k  and  h_k = F_k^q + q F_k^{q-1} L ||D_k||^2
    server:    w <- w + eta_s sum_k F_k^q D_k / sum_k h_k

h_k bounds the curvature of the client's powered loss, so that no step size is to be found anew for each q. q = 0 is
FedAvg with uniform weights; a large q comes near the least worst loss (afl).

On the wire: as FedAvg, and up h_k, 8 bytes. Every client passes over its training rows once more, forward only.

Differs from the paper in: both sums are divided by L, which cancels; clients are sampled uniformly instead of by their
size, `weighting=examples` puts the sizes into both sums instead; a loss below 1e-10 counts as 1e-10.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat

from fedloom import tensors
from fedloom.algorithms.base import Client, Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.client.optimizers import Sgd
from fedloom.types import Bundle, ClientUpdate, Memory, Message, ServerState, Steps, Tensors

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

SMALLEST = 1e-10


class QFedAvg(FedAvg, name="qfedavg"):
    """FedAvg with weights that grow with the clients' losses."""

    own_combine: ClassVar[str] = "it takes the ratio of two sums"

    weighting: Literal["examples", "uniform"] = "uniform"
    """Weight of a client in both sums: 1, as in the paper, or its true number of training rows."""
    q: NonNegativeFloat = 1.0
    """How much even losses count; 0 is FedAvg."""
    lipschitz: PositiveFloat | None = None
    """L, a bound of how fast gradients change; null: 1 / the round's learning rate, which holds for SGD."""

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        optimizer = recipe.trainer.optimizer
        if self.q > 0 and self.lipschitz is None and not isinstance(optimizer, Sgd):
            yield (
                f"trainer.optimizer={optimizer.part_name}: algorithm.lipschitz=null stands for 1 / trainer.lr, which "
                "says how fast gradients change only where steps are lr x gradient; set trainer.optimizer=sgd, or "
                "algorithm.lipschitz to a number, such as 1"
            )

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start = message.groups["params"].tensors
        sums = (yield from client.score(start, "train")).scalars
        loss = max(SMALLEST, sums["nll"] / max(1.0, sums["tokens"]))
        fitted = yield from client.fit(start)
        delta, bound = tensors.sub(fitted.params, start), self.lipschitz or 1 / fitted.lr
        height = loss**self.q + self.q * loss ** (self.q - 1) * bound * tensors.norm(delta) ** 2
        # a tensor, so that the aggregator takes its mean with the same weights
        heights = Bundle({"h": torch.tensor(height, dtype=torch.float64)})
        update = client.update(tensors.scale(delta, loss**self.q), fitted, height=heights)
        return replace(update, metrics={**update.metrics, "loss_at_start": loss}), client.memory

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        height = float(combined.groups["height"].tensors["h"])
        change = tensors.scale(combined.groups["params"].tensors, 1 / height)
        groups = {**combined.groups, "params": Bundle(change)}
        return (yield from super().step(server, state, replace(combined, groups=groups)))

    def trained(self, server: Server, state: ServerState, update: ClientUpdate) -> Tensors | None:
        return None  # the mean of the clients' products is not what it is after
