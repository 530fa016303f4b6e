"""PF2LoRA (Hao et al., arXiv 2503.03920), its first-order form: a private adapter of lower rank upon the shared one.

    layer      y = W_0 x + s(r) B A x + s(r') D_k C_k x,   r' <= r
    client k:  lower level: steps on C_k and D_k, A and B as they came
               upper level: steps on A and B, C_k and D_k as they now are
    server:    FedAvg of A and B

C_k is drawn alike by all and D_k begins at zero. `lower_steps` = 0 is FedAvg, bit for bit.

On the wire: as FedAvg. C_k and D_k never travel.

Differs from the paper in: the hypergradient, by which the upper level sees how the lower one answers to it, is left
out; the lower level takes all its steps of a round before the upper level begins, not one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from fedloom import slots, tensors
from fedloom.algorithms.base import Client
from fedloom.algorithms.fedavg import FedAvg
from fedloom.types import Bundle, ClientUpdate, Fitted, Memory, Message, ServerState, Steps, Tensors, done

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

OWN = "private"
"""Name of the memory group that holds a client's C and D."""


class Pf2Lora(FedAvg, name="pf2lora"):
    """FedAvg of one adapter, and a private one of lower rank upon it at every client."""

    needs_lora: ClassVar[bool] = True
    personal: ClassVar[bool] = True

    rank: PositiveInt = 2
    """r', rank of the private adapter; at most that of the shared one."""
    lower_steps: NonNegativeInt | None = None
    """Optimiser steps on the private adapter in a round; 0: there is none, which is FedAvg; null: as many as the
    trainer's."""
    lower_lr: PositiveFloat | None = None
    """Learning rate of the private adapter, before the schedule; null: the trainer's."""

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        shared = getattr(recipe.adapter, "r", self.rank)
        if self.rank > shared:
            yield (
                f"algorithm.rank={self.rank} is the rank of the private adapter, which stands upon the shared one of "
                f"adapter.r={shared}; allowed: 1 to {shared}"
            )

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        shared = message.groups["params"].tensors
        if self.lower_steps == 0:
            return (yield from super().train(client, message))
        lower = yield from self._lower(client, shared, self.lower_steps)
        fitted = yield from client.fit(lower.params, trainable=slots.is_main)
        update = client.update(tensors.sub(slots.main(fitted.params), shared), fitted, also=[lower])
        return update, {**client.memory, OWN: Bundle(slots.slot(fitted.params, 1))}

    def own(self, client: Client, message: Message) -> Steps[Tensors]:
        shared = message.groups["params"].tensors
        return done(slots.beside(shared, client.memory[OWN].tensors) if OWN in client.memory else shared)

    def adapt(self, client: Client, message: Message, steps: int) -> Steps[Tensors]:
        if self.lower_steps == 0:
            return (yield from super().adapt(client, message, steps))
        fitted = yield from self._lower(client, message.groups["params"].tensors, steps)
        return fitted.params

    def export(self, state: ServerState, memory: Memory | None = None) -> Mapping[str, Tensors]:
        if memory is None:
            return {"shared": state.params}
        own = slots.beside(state.params, memory[OWN].tensors) if OWN in memory else state.params
        return {"personal": own}

    def _lower(self, client: Client, shared: Tensors, steps: int | None) -> Steps[Fitted]:
        """Train the private adapter upon the shared one, and return both."""
        private = client.memory[OWN].tensors if OWN in client.memory else self._fresh(client)
        how = {"steps": None if steps is None else range(steps), "lr": self.lower_lr}
        return (yield from client.fit(slots.beside(shared, private), trainable=_is_private, **how))

    def _fresh(self, client: Client) -> Tensors:
        drawn = client.draw(0)
        fresh = {}
        for module in slots.modules(drawn):
            a, b = drawn[f"{module}.lora_A"], drawn[f"{module}.lora_B"]
            fresh[f"{module}.lora_A"] = a[: self.rank].clone()
            fresh[f"{module}.lora_B"] = torch.zeros(len(b), self.rank, dtype=b.dtype)
        return fresh


def _is_private(name: str) -> bool:
    return not slots.is_main(name)
