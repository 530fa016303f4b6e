"""RoLoRA (Chen et al., arXiv 2502.01755; first arXiv 2409.02346): the factors take turns.

    rounds 0, 2, ...:  client k trains B_k on the common A,   B = sum_k p_k B_k
    rounds 1, 3, ...:  client k trains A_k on the common B,   A = sum_k p_k A_k

All products of a round share a factor, so their mean is exact; unlike FFA-LoRA's, the row space of A is learnt too. B
goes first: while B = 0 the gradient of A is zero.

On the wire: up the factor that moved, b r d_out or b r d_in a layer. Down the factor that moved in the round before, to
a client that took part in it and so has the other one in its memory; else both.

A server optimiser, and an aggregator that remembers, has a state for each factor, which rests while the other moves.

Differs from the paper in: nothing known; the optimiser is built afresh every round, as for all methods here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from fedloom.algorithms.base import Client, Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.halves import Factor, applied, change, half, moves, product_problems
from fedloom.server.aggregate import Around
from fedloom.types import Bundle, ClientUpdate, Memory, Message, ServerState, Steps, Tensors, done

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

KEPT = ("server_optimizer", "aggregator")
"""Slots of which each factor has its own."""


class RoLora(FedAvg, name="rolora"):
    """FedAvg of B and of A in turns."""

    needs_lora: ClassVar[bool] = True
    tells_missed: ClassVar[bool] = True

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        yield from product_problems(self.part_name, recipe)

    @staticmethod
    def moving(round_: int) -> Factor:
        """Return the factor that is trained in a round."""
        return "lora_A" if round_ % 2 else "lora_B"

    def broadcast(self, server: Server, state: ServerState, client: str) -> Message:
        before = state.round - 1
        has_rest = before >= 0 and state.seen.get(client) == before
        return Message({"params": Bundle(half(state.params, self.moving(before)) if has_rest else state.params)})

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start, factor = self._whole(client, message), self.moving(client.round)
        fitted = yield from client.fit(start, trainable=moves(factor))
        frozen = half(start, self.moving(client.round + 1))
        return client.update(change(fitted.params, start, factor), fitted), {**client.memory, "frozen": Bundle(frozen)}

    def around(self, server: Server, state: ServerState) -> Around:
        return super().around(server, replace(state, slots=self._slots(state)))

    def trained(self, server: Server, state: ServerState, update: ClientUpdate) -> Tensors | None:
        return applied(state.params, update.message.groups["params"].tensors)

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        factor = self.moving(state.round)
        alone = replace(state, params=half(state.params, factor), slots=self._slots(state))
        after = yield from super().step(server, alone, combined)
        slots = {**state.slots, **{f"{name}:{factor}": kept for name, kept in after.slots.items()}}
        return replace(after, params={**state.params, **after.params}, slots=slots)

    def own(self, client: Client, message: Message) -> Steps[Tensors]:
        return done(self._whole(client, message))

    def _slots(self, state: ServerState) -> dict[str, Bundle]:
        """Return what is kept for the factor that moves."""
        own = {name: f"{name}:{self.moving(state.round)}" for name in KEPT}
        return {name: state.slots[key] for name, key in own.items() if key in state.slots}

    @staticmethod
    def _whole(client: Client, message: Message) -> Tensors:
        frozen = client.memory.get("frozen", Bundle()).tensors
        known = {**frozen, **message.groups["params"].tensors}
        return {name: known[name] for name in client.initial}
