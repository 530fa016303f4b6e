"""Dec-LoRA (Ghiasvand et al., arXiv 2501.15361): no server, clients mix with their neighbours.

    client i:  w_i <- local steps from w_i,   then   w_i <- sum_j Q_ij w_j,   for A and B apart
               Q_ij = 1 / (1 + max(deg_i, deg_j)) for neighbours, Q_ii = 1 - sum_j Q_ij      (Metropolis)

What is here called server is the wire: it holds each client's last sent adapter until its neighbours have it. Clients
mix at the beginning of the next round, and before they are measured or exported; the global adapter is the mean over
clients, which mixing keeps. A client mixes its own adapter from its memory, so that it never travels to itself.

On the wire: up w_i, b P bytes; down the neighbours' adapters, deg_i b P.

`neighbour_distance` in a client's metrics is how far mixing moved it, ||w_i - sum_j Q_ij w_j||; slot `consensus` holds
sum_i ||w_i - mean||^2 of what was sent.

Differs from the paper in: nothing is known to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from torch import Tensor

from fedloom import graphs, seeds, tensors
from fedloom.algorithms.base import Client, Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.stacking import mean_of
from fedloom.data.partition import Natural
from fedloom.graphs import Graph, Ring
from fedloom.types import Bundle, ClientUpdate, Memory, Message, RecipeError, ServerState, Steps, Tensors, done

if TYPE_CHECKING:
    import torch

    from fedloom.recipe import Recipe

PEER = "peer:"
"""Prefix of the slot with what one client sent last."""
PEERS, MEAN = "peers", "mean"
"""The message group with the neighbours' adapters and weights; for a client outside the graph, that with the mean."""
Near: TypeAlias = Mapping[str, tuple[float, Tensors]]
"""Neighbour -> its weight, and what it sent last (empty: nothing yet)."""
LOOKED_AT = 16
"""Rounds in which the recipe's sampler is asked whether it takes everybody."""


class DecLora(FedAvg, name="dec-lora"):
    """Gossip: every client averages with its neighbours in a graph."""

    personal: ClassVar[bool] = True
    own_combine: ClassVar[str] = "every client mixes with its own neighbours"
    own_step: ClassVar[str] = "there is no server"

    weighting: Literal["uniform"] = "uniform"
    """Every client counts the same."""
    graph: Graph = Ring()
    """Who talks to whom."""

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        for knob in (key for key in ("transforms", "attacks") if getattr(recipe, key)):
            yield f"{knob} act on changes, but with algorithm=dec-lora clients send whole adapters; set {knob}=[]"
        names, data = [f"client-{i + 1}" for i in range(recipe.data.clients)], recipe.data
        with suppress(RecipeError):  # a cohort that cannot be drawn is refused where the clients are known
            cohorts = (recipe.sampler.cohort(t, names, recipe.seed) for t in range(min(recipe.rounds, LOOKED_AT)))
            if any(len(cohort) < len(names) for cohort in cohorts):
                yield (
                    f"sampler={recipe.sampler.part_name} leaves clients out, but with algorithm=dec-lora every client "
                    "mixes with its neighbours in every round; set sampler=uniform without fraction and count"
                )
        if isinstance(data.partition, Natural) or data.unseen:
            return  # how many clients there are is known with the rows
        stream = seeds.generator(recipe.seed, 0, None, "graph")
        if apart := graphs.lonely(self.graph.edges(len(names), stream), names):
            yield self._torn(names[0], apart)

    def mixing(self, clients: Iterable[str], stream: torch.Generator) -> dict[str, dict[str, float]]:
        """Return client -> neighbour -> Q_ij.

        Raises:
            RecipeError: the graph is not connected.
        """
        names = list(clients)
        edges = self.graph.edges(len(names), stream)
        if apart := graphs.lonely(edges, names):
            raise RecipeError(self._torn(names[0], apart))
        rows = graphs.metropolis(edges).tolist()
        near = edges.tolist()
        return {name: {names[j]: rows[i][j] for j in range(len(names)) if near[i][j]} for i, name in enumerate(names)}

    def broadcast(self, server: Server, state: ServerState, client: str) -> Message:
        near = self.mixing(server.clients, server.stream(0, "graph")).get(client)
        if near is None:  # it never trains, so it is nobody's neighbour
            return Message({MEAN: Bundle(_mean(state))})
        return Message({PEERS: _packed({name: (weight, _sent(state, name)) for name, weight in near.items()})})

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        own = _own(client.memory, client.initial)
        near = _unpacked(message.groups[PEERS])
        start = _mixed(own, near, client.initial)
        fitted = yield from client.fit(start)
        adapter = tensors.add(start, tensors.sub(fitted.params, start))  # as a server would apply it
        moved = tensors.norm(tensors.sub(start, own))
        metrics = {**client.update({}, fitted).metrics, "neighbour_distance": moved}
        weights = {name: weight for name, (weight, _) in near.items()}
        memory = {**client.memory, "adapter": Bundle(adapter, weights)}
        return ClientUpdate(client.name, client.weight, Message({"adapter": Bundle(adapter)}), metrics), memory

    def trained(self, server: Server, state: ServerState, update: ClientUpdate) -> Tensors | None:
        return update.message.groups["adapter"].tensors

    def combine(self, server: Server, state: ServerState, updates: Iterable[ClientUpdate]) -> Steps[Message]:
        return done(Message({f"{PEER}{update.client}": update.message.groups["adapter"] for update in updates}))

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        after = replace(state, round=state.round + 1, slots={**state.slots, **combined.groups})
        mean, sent = _mean(after), _all_sent(after)
        apart = sum(tensors.norm(tensors.sub(one, mean)) ** 2 for one in sent)
        return done(replace(after, slots={**after.slots, "consensus": Bundle(scalars={"distance": apart})}))

    def own(self, client: Client, message: Message) -> Steps[Tensors]:
        if MEAN in message.groups:
            return done(message.groups[MEAN].tensors)
        near = _unpacked(message.groups[PEERS])
        mixed = _mixed(_own(client.memory, client.initial), near, client.initial)
        return done(mixed)

    def export(self, state: ServerState, memory: Memory | None = None) -> Mapping[str, Tensors]:
        if memory is None:
            return {"shared": _mean(state)}
        near = memory["adapter"].scalars if "adapter" in memory else {}
        held = {name: (weight, _sent(state, name)) for name, weight in near.items()}
        return {"local": _mixed(_own(memory, state.params), held, state.params)}

    def _torn(self, first: str, apart: Sequence[str]) -> str:
        knob = "algorithm.graph.p" if "p" in type(self.graph).model_fields else "algorithm.graph"
        return (
            f"algorithm.graph={self.graph.part_name}: the graph is not connected, {first} cannot reach "
            f"{', '.join(apart[:5])}; raise {knob}, choose another seed, or set algorithm.graph=ring"
        )


def _sent(state: ServerState, name: str) -> Tensors:
    return state.slots.get(f"{PEER}{name}", Bundle()).tensors


def _all_sent(state: ServerState) -> list[Tensors]:
    return [bundle.tensors for group, bundle in state.slots.items() if group.startswith(PEER)]


def _own(memory: Memory, initial: Tensors) -> Tensors:
    return memory["adapter"].tensors if "adapter" in memory else initial


def _packed(near: Near) -> Bundle:
    """Return neighbours as one group of a message."""
    held, weights, names = dict[str, Tensor](), dict[str, float](), dict[str, str]()
    for place, (name, (weight, params)) in enumerate(near.items()):
        held.update({f"{place}.{key}": t for key, t in params.items()})
        weights[f"{place}.weight"], names[f"{place}.client"] = weight, name
    return Bundle(held, weights, names)


def _unpacked(bundle: Bundle) -> Near:
    """Return the neighbours of `_packed`, in the same order."""
    near = {}
    for place in range(len(bundle.texts)):
        begins = f"{place}."
        params = {key.removeprefix(begins): t for key, t in bundle.tensors.items() if key.startswith(begins)}
        near[bundle.texts[f"{place}.client"]] = (bundle.scalars[f"{place}.weight"], params)
    return near


def _mixed(own: Tensors, near: Near, initial: Tensors) -> dict[str, Tensor]:
    """Return w_i + sum_j Q_ij (w_j - w_i), which is w_i exactly where all are equal.

    Args:
        near: a neighbour that never sent anything is where everybody starts.
    """
    mixed = dict(own)
    for weight, params in near.values():
        mixed = tensors.add(mixed, tensors.sub(params or initial, own), alpha=weight)
    return mixed


def _mean(state: ServerState) -> Tensors:
    """Return the mean of what the clients sent; before the first round it is where everybody starts."""
    sent = _all_sent(state)
    return mean_of([(1.0, one) for one in sent]) if sent else state.params
