"""FLoRA (Wang et al., arXiv 2409.05976): stacking instead of averaging, exact for any ranks.

    client k:  from a fresh adapter (A random, B = 0), on W^t
    server:    A = [p_1 s_1 A_1; ...; p_K s_K A_K],  B = [B_1 ... B_K]
               W^{t+1} = W^t + B A = W^t + sum_k p_k s_k B_k A_k

On the wire: up b r_k (d_in + d_out) a layer; down the stack of every round that the client lacks, b (sum_k r_k) (d_in +
d_out) for a client of the round before. The fresh adapter is drawn by everybody from the seed and the round.

Differs from the paper in: scales are folded into the stack, so clients may differ in them; a quantised base keeps the
stack beside it; the fresh A is the same for all clients (cut to their ranks).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from fedloom import baselog, tensors
from fedloom.algorithms.base import Client, Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.stacking import combined_stack, stack_of
from fedloom.types import ClientUpdate, Memory, Message, ServerState, Steps, Tensors, done

if TYPE_CHECKING:
    from fedloom.recipe import Recipe


class Flora(FedAvg, name="flora"):
    """Products of the clients' factors, merged into the base."""

    needs_lora: ClassVar[bool] = True
    mixed_ranks: ClassVar[bool] = True
    changes_base: ClassVar[bool] = True
    tells_missed: ClassVar[bool] = True
    own_combine: ClassVar[str] = "factors are stacked, not averaged"
    own_step: ClassVar[str] = "the stack is merged into the base"

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        if recipe.init is not None:
            yield (
                "init: algorithm=flora begins every round with a fresh adapter, so the given one would be lost; merge "
                "it into the model first (fedloom export --to merged), or use another algorithm"
            )

    def broadcast(self, server: Server, state: ServerState, client: str) -> Message:
        return Message(self.news(state, client))

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start = client.draw(client.round)
        fitted = yield from client.fit(start)
        return client.update(tensors.sub(fitted.params, start), fitted), client.memory

    def trained(self, server: Server, state: ServerState, update: ClientUpdate) -> Tensors | None:
        start = server.ranks.cut(server.draw(state.round), update.client)
        return tensors.add(start, update.message.groups["params"].tensors)

    def combine(self, server: Server, state: ServerState, updates: Iterable[ClientUpdate]) -> Steps[Message]:
        return done(combined_stack(self, server, state, updates))

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        after = state.round + 1
        base = baselog.merged(state.base, after, stack_of(combined))
        # with B = 0 it adds nothing to the base
        return done(replace(state, round=after, params=server.draw(after), base=base))

    def own(self, client: Client, message: Message) -> Steps[Tensors]:
        return done(client.draw(client.round))
