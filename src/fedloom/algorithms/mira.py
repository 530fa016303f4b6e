"""MIRA (Elbakary et al., arXiv 2410.15524): federated multi-task learning, a task a client.

    minimise   sum_k F_k(w_k) + lambda/2 sum_{k,l} a_kl ||w_k - w_l||^2      (each pair once)
    client k:  w^_k = local steps from its own w_k
    server:    keeps all;  w_k <- w^_k - eta lambda sum_l a_kl (w^_k - w^_l)

a_kl says how related two tasks are: from the adapters, max(0, cos) / N of their changes since the common start, found
anew in every round; 1 / N for every pair; or as given. The sum is over clients that have sent something, absent ones as
they are now. a is symmetric, so that mixing keeps the sum of all w_k. eta lambda = 0 is local training; with 1 / N and
eta lambda = 1 everyone has the mean.

w_k is what client k uses; the server holds it. A client outside the federation uses the mean of all.

On the wire: down w_k, up w^_k - w_k: b P bytes each, of every client by itself, so that the server sees the clients'
adapters and keeps N of them.

Differs from the paper in: clients may be absent; the relation may follow the adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import NonNegativeFloat, model_validator
from torch import Tensor

from fedloom import tensors
from fedloom.algorithms import kept
from fedloom.algorithms.base import Client, Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.types import Bundle, ClientUpdate, Memory, Message, ServerState, Steps, Tensors, done

if TYPE_CHECKING:
    from fedloom.recipe import Recipe


class Mira(FedAvg, name="mira"):
    """Every client has an adapter of its own, drawn towards those of related tasks."""

    personal: ClassVar[bool] = True
    needs_others: ClassVar[str] = "draws adapters of related tasks together"
    own_combine: ClassVar[str] = "every client mixes with related ones"
    own_step: ClassVar[str] = "there is no global adapter"

    weighting: Literal["uniform"] = "uniform"
    """Every client counts the same."""
    coupling: NonNegativeFloat = 0.5
    """eta lambda, how far adapters are drawn together in a round; 0 is local training."""
    relation: Literal["cosine", "complete"] | tuple[tuple[NonNegativeFloat, ...], ...] = "cosine"
    """a: from the adapters' cosines; 1 / N for every pair; or symmetric rows of numbers, one a client."""

    @model_validator(mode="after")
    def _is_a_graph(self) -> Self:
        if isinstance(self.relation, str):
            return self
        rows, n = self.relation, len(self.relation)
        if any(len(row) != n for row in rows):
            raise ValueError(f"relation: {n} rows must have {n} numbers each, one a client")
        odd = [(i, j) for i in range(n) for j in range(i) if rows[i][j] != rows[j][i]]
        if odd:
            i, j = odd[0]
            raise ValueError(
                f"relation: row {i + 1} has {rows[i][j]:g} at place {j + 1}, row {j + 1} has {rows[j][i]:g} at place "
                f"{i + 1}; it must be symmetric, or mixing would not keep the clients' mean"
            )
        return self

    def check_clients(self, clients: int) -> Iterable[str]:
        yield from super().check_clients(clients)
        if not isinstance(self.relation, str) and len(self.relation) != clients:
            yield (
                f"algorithm.relation has {len(self.relation)} rows, and there are {clients} clients that train; give a "
                "row of each, or set algorithm.relation=cosine"
            )

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        if self.coupling * self._degree() >= 1:
            yield (
                f"algorithm.coupling={self.coupling:g}: with degrees of algorithm.relation up to {self._degree():g} "
                "their product must be below 1, or adapters swing ever further apart; lower algorithm.coupling to less "
                f"than {1 / self._degree():g}"
            )

    def related(self, names: Sequence[str], adapters: Sequence[Tensors], start: Tensors, all_: Sequence[str]) -> Tensor:
        """Return a_kl of some clients, in float64, with zeros on the diagonal.

        Args:
            names, adapters: of these.  start: where all began.  all_: every client, in client order.
        """
        n = len(all_)
        if self.relation == "cosine":
            found = kept.cosines([tensors.sub(one, start) for one in adapters]).clamp_min(0) / n
        elif self.relation == "complete":
            found = torch.full((len(names), len(names)), 1 / n, dtype=torch.float64)
        else:
            places = [all_.index(name) for name in names]
            found = torch.tensor(self.relation, dtype=torch.float64)[places][:, places]
        return found.fill_diagonal_(0)

    def broadcast(self, server: Server, state: ServerState, client: str) -> Message:
        inside = client in server.clients
        return Message({"params": Bundle(kept.kept(state, client) if inside else kept.mean(state))})

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start = message.groups["params"].tensors
        fitted = yield from client.fit(start)
        return client.update(tensors.sub(fitted.params, start), fitted), kept.signed(client.memory, client.name)

    def combine(self, server: Server, state: ServerState, updates: Iterable[ClientUpdate]) -> Steps[Message]:
        return done(kept.changes(updates))

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        state = replace(state, slots={**state.slots, **kept.slots(kept.moved_on(state, combined))})
        names = [name for name in server.clients if f"{kept.SLOT}{name}" in state.slots]
        held = [kept.kept(state, name) for name in names]
        weights = self.coupling * self.related(names, held, state.params, server.clients)
        mixed = dict(zip(names, kept.mixtures(weights, held), strict=True))
        return done(replace(state, round=state.round + 1, slots={**state.slots, **kept.slots(mixed)}))

    def trained(self, server: Server, state: ServerState, update: ClientUpdate) -> Tensors | None:
        return None  # there is no global product

    def export(self, state: ServerState, memory: Memory | None = None) -> Mapping[str, Tensors]:
        if memory is None:
            return {}
        name = kept.signer(memory)
        return {"personal": state.params if name is None else kept.kept(state, name)}

    def _degree(self) -> float:
        """Return an upper bound of sum_l a_kl."""
        if isinstance(self.relation, str):
            return 1.0 - 1e-12  # N - 1 times at most 1 / N
        return max((sum(row) - row[k] for k, row in enumerate(self.relation)), default=0.0)
