"""pFedMe (Dinh et al., arXiv 2006.08848): personal adapters through Moreau envelopes.

    client k:  w_k = w^t;  for each of the round's R batches:
                   theta ~ argmin f_k(theta; batch) + lambda/2 ||theta - w_k||^2      by K steps on that batch
                   w_k <- w_k - eta lambda (w_k - theta)
    server:    w^{t+1} = (1 - beta) w^t + beta sum_k p_k w_k

The last theta is what client k uses; a client that has never trained uses w^t. The K steps go on from the theta of the
batch before (from w^t at first), with the trainer's optimiser and learning rate, whose moments go on as well.

On the wire: as FedAvg; theta never travels. K times the steps of FedAvg.

Differs from the paper in: theta is kept and used as it was when the client last took part, not found anew from the
newest w; beta scales the mean change, so that a server optimiser may act on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from fedloom import tensors
from fedloom.algorithms.base import Client, Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.phases import joined
from fedloom.types import (
    Bundle,
    ClientUpdate,
    Fitted,
    Memory,
    Message,
    Penalty,
    ServerState,
    Steps,
    Tensors,
    done,
)

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

OWN = "personal"
"""Name of the memory group that holds a client's theta."""


class PFedMe(FedAvg, name="pfedme"):
    """Clients send proximal points' averages, and keep their own proximal point."""

    personal: ClassVar[bool] = True

    lam: NonNegativeFloat = 15.0
    """lambda, how near the personal adapter stays to the shared one."""
    inner_steps: PositiveInt = 5
    """K, optimiser steps on one batch."""
    outer_lr: PositiveFloat = 0.005
    """eta, of the steps of the client's copy of the shared adapter; eta lambda = 1 takes it to theta."""
    beta: PositiveFloat = 1.0
    """Share of the clients' mean in the new shared adapter."""

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        if self.outer_lr * self.lam >= 2:
            yield (
                f"algorithm.outer_lr x algorithm.lam is {self.outer_lr * self.lam:g}: from 2 on the outer steps go "
                "ever further away; lower one of them, to a product of at most 1"
            )
        if recipe.trainer.decay != 1:
            yield "algorithm=pfedme fits batch by batch, and trainer.decay would begin anew each time; set it to 1"

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start = message.groups["params"].tensors
        w, theta = start, start
        fits: list[Fitted] = []
        moments = Bundle()
        for i in range(client.steps):
            steps = (i,) * self.inner_steps
            fitted = yield from client.fit(theta, steps=steps, penalty=self._near(w), optimizer_state=moments)
            theta, moments = fitted.params, fitted.optimizer_state
            w = tensors.add(w, tensors.sub(w, theta), alpha=-self.outer_lr * self.lam)
            fits.append(fitted)
        update = client.update(tensors.sub(w, start), joined(fits))
        return update, {**client.memory, OWN: Bundle(theta)}

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        change = tensors.scale(combined.groups["params"].tensors, self.beta)
        groups = {**combined.groups, "params": Bundle(change)}
        return (yield from super().step(server, state, replace(combined, groups=groups)))

    def own(self, client: Client, message: Message) -> Steps[Tensors]:
        return done(client.memory.get(OWN, message.groups["params"]).tensors)

    def adapt(self, client: Client, message: Message, steps: int) -> Steps[Tensors]:
        own, shared = (yield from self.own(client, message)), message.groups["params"].tensors
        fitted = yield from client.fit(own, steps=range(steps), penalty=self._near(shared))
        return fitted.params

    def export(self, state: ServerState, memory: Memory | None = None) -> Mapping[str, Tensors]:
        if memory is None:
            return {"shared": state.params}
        return {"personal": memory.get(OWN, Bundle(state.params)).tensors}

    def _near(self, to: Tensors) -> Penalty:
        return lambda theta: 0.5 * self.lam * tensors.sq_dist(theta, to)
