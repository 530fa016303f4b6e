"""FFA-LoRA (Sun et al., arXiv 2403.12313): A stays what it was drawn as, and only B is trained and sent.

    client k:  trains B_k from B^t, on the A that everybody starts from
    server:    B^{t+1} = sum_k p_k B_k

All products share A, so their mean is exact: sum_k p_k s B_k A = s B^{t+1} A. What can be learnt lies in the row space
of A, so it takes a larger rank than LoRA; the size of A acts as a learning rate.

On the wire: down and up b r d_out a layer. A never travels: everybody draws it from the seed.

Differs from the paper in: the optimiser is that of the recipe.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from fedloom.algorithms.base import Client, Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.halves import applied, change, half, moves, product_problems
from fedloom.types import Bundle, ClientUpdate, Memory, Message, ServerState, Steps, Tensors, done

if TYPE_CHECKING:
    from fedloom.recipe import Recipe


class FfaLora(FedAvg, name="ffa-lora"):
    """FedAvg of B on a frozen A."""

    needs_lora: ClassVar[bool] = True

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        yield from product_problems(self.part_name, recipe)

    def broadcast(self, server: Server, state: ServerState, client: str) -> Message:
        return Message({"params": Bundle(half(state.params, "lora_B"))})

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start = _whole(client, message)
        fitted = yield from client.fit(start, trainable=moves("lora_B"))
        return client.update(change(fitted.params, start, "lora_B"), fitted), client.memory

    def trained(self, server: Server, state: ServerState, update: ClientUpdate) -> Tensors | None:
        return applied(state.params, update.message.groups["params"].tensors)

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        after = yield from super().step(server, replace(state, params=half(state.params, "lora_B")), combined)
        return replace(after, params={**state.params, **after.params})

    def own(self, client: Client, message: Message) -> Steps[Tensors]:
        return done(_whole(client, message))


def _whole(client: Client, message: Message) -> Tensors:
    return {**client.initial, **message.groups["params"].tensors}
