"""FL+HC (Briggs et al., arXiv 2004.11791): clients whose updates are alike train together, apart from the others.

    rounds before `warmup`:  FedAvg
    in the next round:       D_k = w_k - w of the cohort are put into clusters, bottom up: the two nearest clusters are
                             joined until all are further apart than `distance` (or until `clusters` are left)
                             z_c = w + sum_{k in c} p_k D_k
    afterwards:              FedAvg within every cluster:  z_c <- z_c + sum_{k in c} p_k (w_k - z_c)

A client that was absent then trains once from w, the model that was clustered, when it next takes part, and joins the
cluster whose mean change is nearest to its own; that change does nothing else. So there are never more clusters than
that one cohort shows: make it large. One cluster is FedAvg, bit for bit.

A client uses the model of its cluster; before it has one, w. A client outside the federation gets the models of all
clusters and uses the one with the least loss on its own training rows.

On the wire: as FedAvg. The server sees every client's update.

Differs from the paper in: clients may be absent when clusters are made, and join later; distances are between adapters'
changes, and may be one minus the cosine beside Manhattan and Euclidean ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from scipy.cluster.hierarchy import fcluster, linkage

from fedloom.algorithms import kept
from fedloom.algorithms.base import Client, Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.server.aggregate import Mean
from fedloom.types import Bundle, ClientUpdate, Memory, Message, RecipeError, ServerState, Steps, Tensors, done

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

MEMBERS = "clusters"
"""The slot that tells which client is in which cluster."""
CENTRE, MODEL = "centre:", "cluster:"
"""Prefixes of the slots with a cluster's mean change when it was made, and with its model."""


class Clustered(FedAvg, name="clustered"):
    """FedAvg, and from some round on FedAvg within clusters of clients with similar updates."""

    personal: ClassVar[bool] = True
    needs_others: ClassVar[str] = "groups clients by their updates"
    own_combine: ClassVar[str] = "updates meet within their cluster"
    own_step: ClassVar[str] = "every cluster has a model of its own"

    warmup: NonNegativeInt = 2
    """Rounds of FedAvg before the round whose updates are clustered."""
    metric: Literal["cosine", "euclidean", "manhattan"] = "cosine"
    """How far two changes are from each other: 1 - cosine, Euclidean distance, or the sum of absolute differences."""
    linkage: Literal["average", "complete", "single", "ward"] = "average"
    """How far two clusters are from each other: the mean, largest or smallest distance of their members; or, Euclidean
    alone, by how much joining them raises the squared distances to their centres (Ward)."""
    distance: PositiveFloat = 0.5
    """Clusters that are further apart than this are not joined."""
    clusters: PositiveInt | None = None
    """How many clusters there are at most, instead of `distance`."""

    @model_validator(mode="after")
    def _ward_is_euclidean(self) -> Self:
        if self.linkage == "ward" and self.metric != "euclidean":
            raise ValueError(
                f"metric={self.metric}: linkage=ward is of squared Euclidean distances; set metric=euclidean, or "
                "linkage to average, complete or single"
            )
        return self

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        clients = recipe.data.training_clients() or 0
        with suppress(RecipeError):  # a cohort that cannot be drawn is refused where the clients are known
            cohort = recipe.sampler.cohort(self.warmup, [str(i) for i in range(clients)], recipe.seed)
            if len(cohort) == 1 < clients and self.clusters != 1:
                yield (
                    f"sampler={recipe.sampler.part_name} takes one client of {clients} in the round after "
                    f"algorithm.warmup={self.warmup}, whose cohort is clustered: one cluster would be made, for ever; "
                    "sample more clients, or set algorithm=fedavg"
                )
        if self.warmup >= recipe.rounds:
            yield (
                f"algorithm.warmup={self.warmup}: rounds={recipe.rounds} leaves none in which clusters are made; lower "
                "the one or raise the other"
            )

    def broadcast(self, server: Server, state: ServerState, client: str) -> Message:
        if client not in server.clients and _count(state) > 1:
            return Message({f"{MODEL}{c}": state.slots[f"{MODEL}{c}"] for c in range(_count(state))})
        return Message({"params": Bundle(_model(state, client))})

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        update, memory = yield from super().train(client, message)
        return update, kept.signed(memory, client.name)

    def combine(self, server: Server, state: ServerState, updates: Iterable[ClientUpdate]) -> Steps[Message]:
        if state.round < self.warmup:
            return super().combine(server, state, updates)
        held = list(updates)
        if not _count(state):
            found = self.grouped([update.message.groups["params"].tensors for update in held])
            members = {update.client: c for update, c in zip(held, found, strict=True)}
            taken = held
        else:
            members = _members(state)
            members |= {u.client: self._nearest(state, u) for u in held if u.client not in members}
            # with one cluster there is one model, from which the newcomers have trained as well
            taken = [u for u in held if u.client in _members(state) or _count(state) == 1]
        groups = {MEMBERS: Bundle(texts={name: str(c) for name, c in members.items()})}
        for c in sorted({members[update.client] for update in taken}):
            inside = [update for update in taken if members[update.client] == c]
            groups[f"{MODEL}{c}"] = Mean().combine(inside, self.around(server, state)).groups["params"]
        return done(Message(groups))

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        if MEMBERS not in combined.groups:
            return super().step(server, state, combined)
        first, slots = not _count(state), {**state.slots, MEMBERS: combined.groups[MEMBERS]}
        for group, bundle in combined.groups.items():
            if group.startswith(MODEL):
                before = state.params if first else state.slots[group].tensors
                after, _ = server.optimizer.step(before, bundle.tensors, Bundle(), server.lr)
                slots[group] = Bundle(after)
                if first:
                    slots[f"{CENTRE}{group.removeprefix(MODEL)}"] = bundle
        return done(replace(state, round=state.round + 1, slots=slots))

    def trained(self, server: Server, state: ServerState, update: ClientUpdate) -> Tensors | None:
        return super().trained(server, state, update) if state.round < self.warmup else None

    def own(self, client: Client, message: Message) -> Steps[Tensors]:
        if "params" in message.groups:
            return message.groups["params"].tensors
        losses = []
        for c in range(len(message.groups)):
            sums = yield from client.score(message.groups[f"{MODEL}{c}"].tensors, "train")
            losses.append(sums.scalars["nll"])
        return message.groups[f"{MODEL}{int(np.argmin(losses))}"].tensors

    def export(self, state: ServerState, memory: Memory | None = None) -> Mapping[str, Tensors]:
        if memory is None:
            return {} if _count(state) > 1 else {"shared": _model(state, "")}
        return {"personal": _model(state, kept.signer(memory) or "")}

    def grouped(self, changes: Sequence[Tensors]) -> list[int]:
        """Return the cluster of each change, numbered from 0 in the order in which they come up."""
        if len(changes) == 1:
            return [0]
        apart = self._apart(changes)
        tree = linkage(apart[np.triu_indices(len(changes), 1)], method=self.linkage)
        by = (self.distance, "distance") if self.clusters is None else (self.clusters, "maxclust")
        labels = fcluster(tree, by[0], criterion=by[1]).tolist()
        order = list(dict.fromkeys(labels))
        return [order.index(label) for label in labels]

    def _apart(self, changes: Sequence[Tensors]) -> np.ndarray:
        """Return (n, n) distances."""
        if self.metric == "cosine":
            return (1 - kept.cosines(changes)).clamp_min(0).numpy()
        if self.metric == "manhattan":
            return kept.manhattan(changes).numpy()
        products = kept.inner(changes)
        sizes = products.diagonal()
        return (sizes[:, None] + sizes[None, :] - 2 * products).clamp_min(0).sqrt().numpy()

    def _nearest(self, state: ServerState, update: ClientUpdate) -> int:
        """Return the cluster whose mean change is nearest to that of a client that was absent when it was made."""
        centres = [state.slots[f"{CENTRE}{c}"].tensors for c in range(_count(state))]
        apart = self._apart([update.message.groups["params"].tensors, *centres])
        return int(np.argmin(apart[0, 1:]))


def _members(state: ServerState) -> dict[str, int]:
    return {name: int(c) for name, c in state.slots.get(MEMBERS, Bundle()).texts.items()}


def _count(state: ServerState) -> int:
    """Return how many clusters there are; 0: none have been made yet."""
    return sum(group.startswith(MODEL) for group in state.slots)


def _model(state: ServerState, client: str) -> Tensors:
    """Return what a client trains from: the model of its cluster, or of all while there is none or but one."""
    cluster = 0 if _count(state) == 1 else _members(state).get(client)
    return state.params if cluster is None or not _count(state) else state.slots[f"{MODEL}{cluster}"].tensors
