"""FedPer (Arivazhagan et al., arXiv 1912.00818): some tensors are shared, the others stay with their client.

    client k:  trains phi and h_k together, from (phi^t, its own h_k);  keeps h_k
    server:    phi^{t+1} = sum_k p_k phi_k

`private` says by name what h is: shell patterns over the adapter's tensor names, `*` for any text. With adapter=lora

    private: ["*.lora_B"]               B of every layer, which is FedSA-LoRA
    private: ["model.layers.2[4-9].*"]  the last layers, as in the paper
    private: none                       FedAvg
    private: all                        local training

A LoRA adapter has no norms; where all weights are trained, `private: ["*norm*"]` is FedBN (arXiv 2102.07623). Patterns
that match no tensor, or all of them, are refused before the first round: these two are written `none` and `all`.

On the wire: down phi, up phi_k - phi. h never travels. A client that has never trained has the h that everybody begins
with.

Differs from the paper in: the adapter's tensors are split, as there is no new head; FedBN's running statistics have no
counterpart in language models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from fedloom import tensors
from fedloom.algorithms.base import Client, Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.phases import moved
from fedloom.server.aggregate import Mean
from fedloom.types import (
    Bundle,
    ClientUpdate,
    Fitted,
    Memory,
    Message,
    ServerState,
    Steps,
    Tensors,
    done,
    suggest,
)

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

OWN = "private"
"""Name of the memory group that holds a client's h."""
Patterns: TypeAlias = Literal["none", "all"] | tuple[str, ...]


class FedPer(FedAvg, name="fedper"):
    """FedAvg of some tensors; every client keeps its own others."""

    personal: ClassVar[bool] = True

    private: Patterns = ("*.lora_B",)
    """What stays with the client: patterns of tensor names (`*.lora_B`, `*.layers.29.*`), or `none` or `all`."""

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        aggregator = recipe.server.aggregator
        if isinstance(self.private, tuple) and not self.private:
            yield "algorithm.private=[] has no pattern; write algorithm.private=none if nothing is to be private"
        if self.private == "all" and aggregator != Mean():
            yield (
                f"server.aggregator={aggregator.part_name}: with algorithm.private=all nothing is combined; set "
                "server.aggregator=mean"
            )
        if self.private != "none" and aggregator.products:
            yield (
                "server.aggregator.distance=product needs both factors of every module, and algorithm.private keeps "
                "some; set server.aggregator.distance=factors"
            )

    def check(self, names: Sequence[str]) -> Iterable[str]:
        if isinstance(self.private, str):
            return
        for pattern in self.private:
            if not any(fnmatchcase(name, pattern) for name in names):
                hint = suggest(pattern, names) or f"; names are such as {names[0]!r} and {names[-1]!r}"
                yield (
                    f"algorithm.private: {pattern!r} matches none of the adapter's {len(names)} tensors{hint}; mend or "
                    "remove it, or set algorithm.private=none"
                )
        if all(map(self.keeps, names)):
            yield (
                f"algorithm.private={list(self.private)} matches all {len(names)} tensors of the adapter, so that "
                "nothing is shared; narrow it, or set algorithm.private=all"
            )

    def keeps(self, name: str) -> bool:
        """Return whether a tensor stays with its client."""
        if isinstance(self.private, str):
            return self.private == "all"
        return any(fnmatchcase(name, pattern) for pattern in self.private)

    def shares(self, name: str) -> bool:
        """Return whether a tensor travels."""
        return not self.keeps(name)

    def broadcast(self, server: Server, state: ServerState, client: str) -> Message:
        return Message({"params": Bundle(self._shared(state.params))})

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start = self._whole(client, message)
        fitted = yield from client.fit(start)
        return self._sent(client, start, fitted)

    def trained(self, server: Server, state: ServerState, update: ClientUpdate) -> Tensors | None:
        return super().trained(server, state, update) if self.private == "none" else None

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        after = yield from super().step(server, replace(state, params=self._shared(state.params)), combined)
        # what is private stays where everybody begins, for clients that have not trained yet
        return replace(after, params={**state.params, **after.params})

    def own(self, client: Client, message: Message) -> Steps[Tensors]:
        return done(self._whole(client, message))

    def export(self, state: ServerState, memory: Memory | None = None) -> Mapping[str, Tensors]:
        if memory is None:
            return {"shared": state.params} if self.private == "none" else {}
        return {"personal": {**state.params, **_own(memory)}}

    def _sent(self, client: Client, start: Tensors, fitted: Fitted) -> tuple[ClientUpdate, Memory]:
        delta = tensors.sub(self._shared(fitted.params), self._shared(start))
        own = {name: t for name, t in moved(start, fitted).items() if self.keeps(name)}
        memory = {**client.memory, OWN: Bundle(own)} if own else client.memory
        return client.update(delta, fitted), memory

    def _shared(self, params: Tensors) -> Tensors:
        return {name: t for name, t in params.items() if self.shares(name)}

    def _whole(self, client: Client, message: Message) -> Tensors:
        return {**client.initial, **_own(client.memory), **message.groups["params"].tensors}


def _own(memory: Memory) -> Tensors:
    return memory.get(OWN, Bundle()).tensors
