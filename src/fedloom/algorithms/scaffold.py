"""SCAFFOLD (Karimireddy et al., arXiv 1910.06378), option II.

    client k:  tau steps  y <- y - eta (grad f_k(y) - c_k + c),  from w
               c_k+ = c_k - c + (w - y) / (tau eta)
    server:    w <- w + eta_s mean_k(y_k - w),   c <- c + K/N mean_k(c_k+ - c_k)

K clients of N take part. On the wire: down w and c, up y - w and c_k+ - c_k: twice FedAvg's bytes. c_k stays with the
client. Control variates start at zero.

Differs from the paper in: `variant`. (w - y)/(tau eta) is a mean gradient for plain SGD only; the two variants
for adaptive optimisers are heuristics, and `control_norm` (||c_k||) is logged so that a drifting one shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from fedloom import tensors
from fedloom.algorithms.base import Client, Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.client.optimizers import Sgd
from fedloom.types import (
    Bundle,
    ClientUpdate,
    Correction,
    Memory,
    Message,
    ServerState,
    Steps,
    Tensors,
)

if TYPE_CHECKING:
    from fedloom.recipe import Recipe


class Scaffold(FedAvg, name="scaffold"):
    """FedAvg with control variates that cancel the drift between clients."""

    by_tensor = "corrects the gradients of what it sends"

    weighting: Literal["uniform"] = "uniform"
    """The paper's mean: every client of the cohort counts the same."""
    variant: Literal["sgd_exact", "grad_side", "post_step_adamw"] = "sgd_exact"
    """Where c - c_k enters: the gradient of plain SGD (the paper); the gradient of any optimiser; or the weights, after
    each step of any optimiser."""

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        optimizer = recipe.trainer.optimizer
        plain = isinstance(optimizer, Sgd) and optimizer.momentum == optimizer.weight_decay == 0
        if self.variant == "sgd_exact" and not plain:
            yield (
                "algorithm.variant=sgd_exact holds for plain SGD only; set trainer.optimizer=sgd, or "
                "algorithm.variant=grad_side or post_step_adamw"
            )
        if self.variant == "sgd_exact" and recipe.trainer.clip_norm is not None:
            yield "algorithm.variant=sgd_exact needs unclipped gradients; set trainer.clip_norm=null"
        if recipe.trainer.decay != 1:
            yield "algorithm=scaffold divides by one learning rate of all steps; set trainer.decay=1"

    def init(self, params: Tensors) -> ServerState:
        return ServerState(0, params, {"control": Bundle(tensors.zeros_like(params))})

    def broadcast(self, server: Server, state: ServerState, client: str) -> Message:
        return Message({"params": Bundle(state.params), "control": state.slots["control"]})

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start, c = message.groups["params"].tensors, message.groups["control"].tensors
        own = client.memory["control"].tensors if "control" in client.memory else tensors.zeros_like(c)
        where: Literal["weights", "gradient"] = "weights" if self.variant == "post_step_adamw" else "gradient"
        fitted = yield from client.fit(start, correct=Correction(tensors.sub(c, own), where))
        delta = tensors.sub(fitted.params, start)
        # c_k+ - c_k = -c - (y - w) / (tau eta), with the steps that were really taken
        change = tensors.sub(tensors.scale(delta, -1 / (max(1, fitted.steps) * fitted.lr)), c)
        kept = tensors.add(own, change)
        update = client.update(delta, fitted, control=Bundle(change))
        metrics = {**update.metrics, "control_norm": tensors.norm(kept)}
        return ClientUpdate(update.client, update.weight, update.message, metrics), {
            **client.memory,
            "control": Bundle(kept),
        }

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        after = yield from super().step(server, state, combined)
        share = combined.groups["cohort"].scalars["clients"] / len(server.clients)
        control = tensors.add(state.slots["control"].tensors, combined.groups["control"].tensors, alpha=share)
        return replace(after, slots={**after.slots, "control": Bundle(control)})
