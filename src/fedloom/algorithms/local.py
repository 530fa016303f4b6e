"""Local training: every client alone, the lower baseline of any federation.

Nothing crosses the wire in either direction: a client starts from the common initial adapter and goes on from its own
memory. A client trains in the rounds in which the sampler picks it, so local clients together take the very steps, on
the very rows, that the federated clients take.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import ClassVar

from fedloom import tensors
from fedloom.algorithms.base import Algorithm, Client, Server
from fedloom.types import Bundle, ClientUpdate, Memory, Message, ServerState, Steps, Tensors, done


class Local(Algorithm, name="local"):
    """Every client trains alone and keeps its adapter."""

    regime: ClassVar[str] = "local"
    personal: ClassVar[bool] = True
    mixed_ranks: ClassVar[bool] = True
    own_combine: ClassVar[str] = "nothing is combined"

    def broadcast(self, server: Server, state: ServerState, client: str) -> Message:
        return Message()

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start = self._own(client.memory, client.initial)
        fitted = yield from client.fit(start)
        # applied as a server would apply it, so that a federation of one client equals this bit for bit
        adapter = tensors.add(start, tensors.sub(fitted.params, start))
        metrics = client.update({}, fitted).metrics
        return ClientUpdate(client.name, client.weight, Message(), metrics), {
            **client.memory,
            "adapter": Bundle(adapter),
        }

    def combine(self, server: Server, state: ServerState, updates: Iterable[ClientUpdate]) -> Steps[Message]:
        for _ in updates:
            pass  # the metrics of each are recorded as it passes
        return done(Message())

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        return done(replace(state, round=state.round + 1))

    def own(self, client: Client, message: Message) -> Steps[Tensors]:
        return done(self._own(client.memory, client.initial))

    def export(self, state: ServerState, memory: Memory | None = None) -> Mapping[str, Tensors]:
        return {} if memory is None else {"local": self._own(memory, state.params)}

    @staticmethod
    def _own(memory: Memory, initial: Tensors) -> Tensors:
        return memory["adapter"].tensors if "adapter" in memory else initial
