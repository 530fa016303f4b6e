"""Ditto (Li et al., arXiv 2012.04221): FedAvg, and beside it a personal adapter that is pulled towards the global one.

    client k:  w_k = local steps from w^t, as FedAvg
               v_k <- s steps of v <- v - eta (grad f_k(v) + lambda (v - w^t)),  from its own v_k
    server:    FedAvg of the w_k

v_k is what client k uses. It begins where everybody begins; a client that has never trained uses w^t. The pull is
towards what was received, not towards what local steps made of it. lambda = 0 is local training beside FedAvg.

On the wire: as FedAvg. v_k never travels. Every client trains twice.

Differs from the paper in: the pull is part of the loss, so with AdamW it passes through the preconditioner; the
personal steps take the rows that the global ones take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from pydantic import NonNegativeFloat, PositiveInt

from fedloom import tensors
from fedloom.algorithms.base import Client
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.phases import moved
from fedloom.types import Bundle, ClientUpdate, Memory, Message, Penalty, ServerState, Steps, Tensors, done

OWN = "personal"
"""Name of the memory group that holds a client's v."""


class Ditto(FedAvg, name="ditto"):
    """FedAvg, and a personal adapter with a pull towards the global one."""

    personal: ClassVar[bool] = True

    lam: NonNegativeFloat = 0.1
    """lambda, strength of the pull; 0 is local training."""
    personal_steps: PositiveInt | None = None
    """Optimiser steps of the personal adapter in a round; null: as many as the trainer's."""

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start = message.groups["params"].tensors
        fitted = yield from client.fit(start)
        own = client.memory[OWN].tensors if OWN in client.memory else client.initial
        steps = None if self.personal_steps is None else range(self.personal_steps)
        personal = yield from client.fit(own, steps=steps, penalty=self._pull(start))
        update = client.update(tensors.sub(fitted.params, start), fitted, also=[personal])
        loss = sum(personal.losses) / max(1, len(personal.losses))
        update = replace(update, metrics={**update.metrics, "personal_loss": loss})
        return update, {**client.memory, OWN: Bundle(moved(own, personal))}

    def own(self, client: Client, message: Message) -> Steps[Tensors]:
        return done(client.memory.get(OWN, message.groups["params"]).tensors)

    def adapt(self, client: Client, message: Message, steps: int) -> Steps[Tensors]:
        own = yield from self.own(client, message)
        fitted = yield from client.fit(own, steps=range(steps), penalty=self._pull(message.groups["params"].tensors))
        return fitted.params

    def export(self, state: ServerState, memory: Memory | None = None) -> Mapping[str, Tensors]:
        if memory is None:
            return {"shared": state.params}
        return {"personal": memory.get(OWN, Bundle(state.params)).tensors}

    def _pull(self, to: Tensors) -> Penalty:
        return lambda v: 0.5 * self.lam * tensors.sq_dist(v, to)
