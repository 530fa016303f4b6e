"""FedALT (Bian et al., arXiv 2503.11880): an adapter of one's own beside a frozen one that stands for all others.

    layer      y = W_0 x + rho_0(x) s B_k A_k x + rho_1(x) s B_-k A_-k x,     rho(x) = softmax(G_k x), token by token
    client k:  trains its individual A_k, B_k and its router G_k; the rest of the world A_-k, B_-k stays as it came
    server:    A_-k = mean of the others' latest A_j, and B_-k of their B_j   (j != k; each counts the same)

An average never overwrites what a client has trained. The server keeps the latest adapter of every client that has
trained, so those that are absent still count. As long as no other has, the rest of the world is what everybody begins
with. A client that has never trained has nothing to weigh against it, and uses the mean of all by itself; where it is
adapted it begins as in its first round, with that at a half.

On the wire: up the change of A_k and B_k, down A_-k and B_-k (nothing before another has trained): 2 b P at most. G_k
never travels. The server keeps P numbers a client, and sees every client's adapter.

Saved: `adapters/<client>/personal/`, with `slot0` (the individual adapter) and `slot1` (the rest of the world) as PEFT
folders, and `router.safetensors`; for a client that has never trained the mean of all, as one PEFT folder.

Differs from the paper in: routers begin at zero, so both adapters weigh the same at first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch

from fedloom import slots, tensors
from fedloom.algorithms import kept
from fedloom.algorithms.base import Algorithm, Client, Server
from fedloom.types import Bundle, ClientUpdate, Memory, Message, ServerState, Steps, Tensors, done

OWN, ROUTERS = "individual", "routers"
"""Names of the memory groups with a client's adapter and its routers."""
WORLD = "rest_of_world"
"""Name of the message group with the mean of the others."""


class FedAlt(Algorithm, name="fedalt"):
    """Every client mixes its own adapter with the frozen mean of all others', by a router of its own."""

    needs_lora: ClassVar[bool] = True
    personal: ClassVar[bool] = True
    needs_others: ClassVar[str] = "keeps the latest adapters of other clients, whose mean each client is sent"
    mirrored: ClassVar[str] = "each client's own adapter"
    own_combine: ClassVar[str] = "every client is sent the mean of the others"
    own_step: ClassVar[str] = "there is no adapter of all"

    weighting: Literal["examples", "uniform"] = "uniform"
    """Weight of a client in the others' rest of the world: the same for all, or its number of training rows."""

    def broadcast(self, server: Server, state: ServerState, client: str) -> Message:
        world = _mean(state, client)
        return Message({WORLD: Bundle(world)} if world else {})

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start = self._mixture(client, message)
        fitted = yield from client.fit(start, trainable=_moves)
        change = tensors.sub(slots.main(fitted.params), slots.main(start))
        # applied as the server applies it, so that both hold the same bits
        own = Bundle(tensors.add(slots.main(start), change))
        routers = Bundle({name: t for name, t in fitted.params.items() if slots.is_router(name)})
        memory = kept.signed({**client.memory, OWN: own, ROUTERS: routers}, client.name)
        return client.update(change, fitted), memory

    def combine(self, server: Server, state: ServerState, updates: Iterable[ClientUpdate]) -> Steps[Message]:
        groups = {}
        for update in updates:
            latest = tensors.add(kept.kept(state, update.client), update.message.groups["params"].tensors)
            groups[f"{kept.SLOT}{update.client}"] = Bundle(latest, {"weight": update.weight})
        return done(Message(groups))

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        return done(replace(state, round=state.round + 1, slots={**state.slots, **combined.groups}))

    def trained(self, server: Server, state: ServerState, update: ClientUpdate) -> Tensors | None:
        return None

    def own(self, client: Client, message: Message) -> Steps[Tensors]:
        if OWN not in client.memory:
            return done(message.groups.get(WORLD, Bundle(client.initial)).tensors)
        return done(self._mixture(client, message))

    def adapt(self, client: Client, message: Message, steps: int) -> Steps[Tensors]:
        fitted = yield from client.fit(self._mixture(client, message), trainable=_moves, steps=range(steps))
        return fitted.params

    def export(self, state: ServerState, memory: Memory | None = None) -> Mapping[str, Tensors]:
        if memory is None:
            return {}
        world = _mean(state, kept.signer(memory)) or state.params
        return {"personal": _mixed(memory[OWN].tensors, world, memory) if OWN in memory else world}

    @staticmethod
    def _mixture(client: Client, message: Message) -> Tensors:
        own = client.memory.get(OWN, Bundle(client.initial)).tensors
        world = message.groups.get(WORLD, Bundle(client.initial)).tensors
        return _mixed(own, world, client.memory)


def _mixed(own: Tensors, world: Tensors, memory: Memory) -> Tensors:
    if ROUTERS in memory:
        return slots.routed(own, world, routers=memory[ROUTERS].tensors)
    sizes = {module: own[f"{module}.lora_A"] for module in slots.modules(own)}
    return slots.routed(
        own, world, routers={f"{m}.router": torch.zeros(2, a.shape[1], dtype=a.dtype) for m, a in sizes.items()}
    )


def _moves(name: str) -> bool:
    return slots.is_main(name) or slots.is_router(name)


def _mean(state: ServerState, without: str | None) -> Tensors:
    """Return the mean of the clients' latest adapters without one of them; empty: there is none.

    It is summed anew for everyone: a total less one's own adapter would hold traces of that in its last bits.
    """
    others = [state.slots[f"{kept.SLOT}{name}"] for name in kept.everyone(state) if name != without]
    total = sum(one.scalars["weight"] for one in others)
    weights = [one.scalars["weight"] / total for one in others]
    return kept.mixture(weights, [one.tensors for one in others], 0) if others else {}
