"""FedNova (Wang et al., arXiv 2007.07481): clients that take more steps do not pull harder.

    client k:  tau_k steps of SGD (momentum rho), w_k - w = -eta sum_i a_{k,i} g_{k,i}
               d_k = (w_k - w) / ||a_k||_1,   ||a_k||_1 = sum_{i <= tau_k} (1 - rho^i) / (1 - rho)   (tau_k for rho = 0)
    server:    w <- w + eta_s tau_eff sum_k p_k d_k,   tau_eff = sum_k p_k ||a_k||_1

Steps differ between clients under `trainer.epochs` and `trainer.tokens`. With equal steps it is FedAvg.

On the wire: as FedAvg, and up ||a_k||_1, 8 bytes.

Differs from the paper in: eta is a part of d_k; of its local solvers, SGD with momentum alone is here, without the
proximal one and without decay of the rate within a round; momentum on the server is `server.optimizer`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fedloom import tensors
from fedloom.algorithms.base import Client, Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.client.optimizers import Fraction, Sgd
from fedloom.types import Bundle, ClientUpdate, Memory, Message, ServerState, Steps, Tensors

if TYPE_CHECKING:
    from fedloom.recipe import Recipe


class FedNova(FedAvg, name="fednova"):
    """FedAvg of changes that are normalised by the steps behind them."""

    momentum: Fraction = 0.0
    """rho, that of `trainer.optimizer`."""

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        optimizer = recipe.trainer.optimizer
        if not isinstance(optimizer, Sgd):
            yield (
                f"trainer.optimizer={optimizer.part_name}: algorithm=fednova divides a change by the gradients that it "
                "adds up, and an adaptive optimiser's is no fixed sum of gradients; set trainer.optimizer=sgd"
            )
        elif optimizer.momentum != self.momentum:
            yield (
                f"trainer.optimizer.momentum={optimizer.momentum:g}: algorithm=fednova normalises for a momentum of "
                f"{self.momentum:g}; set algorithm.momentum={optimizer.momentum:g}"
            )
        if recipe.trainer.decay != 1:
            yield "algorithm=fednova counts steps of one learning rate; set trainer.decay=1"

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start = message.groups["params"].tensors
        fitted = yield from client.fit(start)
        total = self.accumulated(fitted.steps)
        direction = tensors.scale(tensors.sub(fitted.params, start), 1 / total)
        # a tensor, so that the aggregator's mean is tau_eff
        normaliser = Bundle({"l1": torch.tensor(total, dtype=torch.float64)})
        return client.update(direction, fitted, normaliser=normaliser), client.memory

    def accumulated(self, steps: int) -> float:
        """Return ||a||_1: how often the gradients of so many steps are added to the weights, in units of eta."""
        return sum((1 - self.momentum**i) / (1 - self.momentum) for i in range(1, max(1, steps) + 1))

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        effective = float(combined.groups["normaliser"].tensors["l1"])
        change = tensors.scale(combined.groups["params"].tensors, effective)
        groups = {**combined.groups, "params": Bundle(change)}
        return (yield from super().step(server, state, replace(combined, groups=groups)))

    def trained(self, server: Server, state: ServerState, update: ClientUpdate) -> Tensors | None:
        groups = update.message.groups
        return tensors.add(state.params, groups["params"].tensors, alpha=float(groups["normaliser"].tensors["l1"]))
