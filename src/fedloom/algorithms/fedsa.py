"""FedSA-LoRA (Guo et al., arXiv 2410.01463): A is shared, B stays with the client.

    client k:  trains A_k and B_k from (A^t, its own B_k);  keeps B_k
    server:    A^{t+1} = sum_k p_k A_k

Every client ends with an adapter of its own, (A, B_k); there is no global one. A client that has never trained has the
B that everybody starts from, which is zero unless `init` gives another: to it the model is the untouched base.

On the wire: down and up b r d_in a layer. B never travels.

Differs from the paper in: no classifier head. One client alone is local training, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from fedloom import tensors
from fedloom.algorithms.base import Client, Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.halves import change, half, product_problems
from fedloom.types import Bundle, ClientUpdate, Memory, Message, ServerState, Steps, Tensors, done

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

OWN = "own_b"
"""Name of the memory group that holds a client's B."""


class FedSaLora(FedAvg, name="fedsa-lora"):
    """FedAvg of A; every client keeps its own B."""

    needs_lora: ClassVar[bool] = True
    personal: ClassVar[bool] = True

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        yield from product_problems(self.part_name, recipe)

    def broadcast(self, server: Server, state: ServerState, client: str) -> Message:
        return Message({"params": Bundle(half(state.params, "lora_A"))})

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start = self._whole(client, message)
        fitted = yield from client.fit(start)
        # applied as a server would apply it, so that one client alone is local training bit for bit
        own = tensors.add(half(start, "lora_B"), change(fitted.params, start, "lora_B"))
        update = client.update(change(fitted.params, start, "lora_A"), fitted)
        return update, {**client.memory, OWN: Bundle(own)}

    def trained(self, server: Server, state: ServerState, update: ClientUpdate) -> Tensors | None:
        return None

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        after = yield from super().step(server, replace(state, params=half(state.params, "lora_A")), combined)
        # B stays what everybody starts from, for clients that have not trained yet
        return replace(after, params={**state.params, **after.params})

    def own(self, client: Client, message: Message) -> Steps[Tensors]:
        return done(self._whole(client, message))

    def export(self, state: ServerState, memory: Memory | None = None) -> Mapping[str, Tensors]:
        return {} if memory is None else {"personal": {**state.params, **_own(memory)}}

    @staticmethod
    def _whole(client: Client, message: Message) -> Tensors:
        return {**client.initial, **_own(client.memory), **message.groups["params"].tensors}


def _own(memory: Memory) -> Tensors:
    return memory.get(OWN, Bundle()).tensors
