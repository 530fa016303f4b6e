"""FedDCA (arXiv 2409.20135): clients train on public rows too, chosen so that together they cover the domain.

    client k:  sends xi centres (k-means) of the embeddings of its questions, once, before round 0
    server:    takes one centre of every client, step by step the one that adds most to the coverage of all centres,
                   cov(D, P) = 1/|D| sum_{d in D} max_{p in P} cos(d, p)
               and gives each client the n public rows nearest to its centre; no row goes to two clients
    client k:  trains on its own rows and these from w^t
    server:    FedAvg,  p_k = rows_k / sum_j rows_j, the given ones included

Embeddings are mean last hidden states of the base model, or come from a model in a folder (`embedder`). Metric
`coverage` is cov(all clients' centres, all public rows that were given away), told in a client's first round.

On the wire: up xi d numbers of 4 bytes, once; down the texts of n rows with a client's first message; else as FedAvg.
Centres tell the server of the clients' questions; a centre of one question is its embedding.

Differs from the paper in: each step takes the best centre of any client without one, where the paper goes by client
order, so gains never grow; the first centres of k-means are not drawn. The variant with a small encoder at the clients
and a projector at the server (FedDCA*) is not built.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveInt, field_validator
from torch import Tensor

from fedloom import tensors
from fedloom.algorithms import coverage
from fedloom.algorithms.base import Client, Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.pairs import packed, unpacked
from fedloom.client.embedder import embedded
from fedloom.types import (
    Bundle,
    ClientUpdate,
    Embed,
    Memory,
    Message,
    Pair,
    RecipeError,
    ServerState,
    Steps,
    Texts,
)

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

CENTRES, GIVEN, COVERAGE = "centres", "given", "coverage"
"""Group of a client's centres; of its public rows, in its first message and then in its memory; slot of figures."""


def given_to(client: str) -> str:
    """Return the name of the slot with the rows that a client is given."""
    return f"client:{client}"


class FedDca(FedAvg, name="feddca"):
    """FedAvg on the clients' rows and public ones that together cover the domain."""

    enrols: ClassVar[bool] = True
    tells_missed: ClassVar[bool] = True

    centres: PositiveInt = 10
    """xi, centres that a client sends; one with fewer rows sends fewer."""
    retrieve: NonNegativeInt = 32
    """n, public rows that each client is given; 0 is FedAvg."""
    embedder: Path | None = None
    """Folder of an encoder (transformers) whose mean last hidden states are the embeddings; null: the base model's."""

    @field_validator("embedder")
    @classmethod
    def _is_there(cls, value: Path | None) -> Path | None:
        if value is not None and not (value.expanduser() / "config.json").is_file():
            raise ValueError(
                f"{value} holds no config.json, so it is no folder of a model; name one, or set "
                "algorithm.embedder=null for the base model's own hidden states"
            )
        return value

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        if not self.retrieve:
            return
        public, clients = recipe.data.public, recipe.data.training_clients() or 1
        if not public:
            yield (
                "algorithm=feddca gives clients rows of the server, which has none; set data.public to their number, "
                f"at least {self.retrieve * clients}, or algorithm.retrieve=0"
            )
        elif isinstance(public, int) and public < self.retrieve * clients:
            yield _too_few(self.retrieve, clients, public)

    def enrol(self, client: Client) -> Steps[Message]:
        if not self.retrieve:
            return Message()
        embeddings = yield from self._embedded()
        return Message({CENTRES: Bundle({CENTRES: coverage.centres(embeddings, self.centres)})})

    def admit(self, server: Server, state: ServerState, told: Mapping[str, Message]) -> Steps[ServerState]:
        if not self.retrieve:
            return state
        stock: Sequence[Pair] = yield Texts()
        if len(stock) < self.retrieve * len(told):
            raise RecipeError(_too_few(self.retrieve, len(told), len(stock)))
        public = yield from self._embedded()
        candidates = [word.groups[CENTRES].tensors[CENTRES] for word in told.values()]
        chosen, gains = coverage.one_each(candidates)
        points = [own[i] for own, i in zip(candidates, chosen, strict=True)]
        taken = coverage.nearest_each(points, public, self.retrieve)
        slots = {given_to(name): packed([stock[i] for i in own]) for name, own in zip(told, taken, strict=True)}
        given = coverage.units(public[[i for own in taken for i in own]])
        figures = {
            "coverage": coverage.covered(torch.cat(candidates), given),
            "centre_coverage": sum(gains) - 1,  # gains are above -1
        }
        return replace(state, slots={**state.slots, **slots, COVERAGE: Bundle(scalars=figures)})

    def broadcast(self, server: Server, state: ServerState, client: str) -> Message:
        groups = dict(super().broadcast(server, state, client).groups)
        if client not in state.seen and given_to(client) in state.slots:
            groups[GIVEN], groups[COVERAGE] = state.slots[given_to(client)], state.slots[COVERAGE]
        return Message(groups)

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start = message.groups["params"].tensors
        given = message.groups.get(GIVEN) or client.memory.get(GIVEN, Bundle())
        pairs = unpacked(given)
        fitted = yield from client.fit(start, pairs=pairs)
        update = client.update(tensors.sub(fitted.params, start), fitted)
        figures = message.groups.get(COVERAGE, Bundle()).scalars
        weight = self.weight(client.examples + len(pairs))
        update = replace(update, weight=weight, metrics={**update.metrics, **figures})
        return update, {**client.memory, GIVEN: given} if GIVEN in message.groups else client.memory

    def _embedded(self) -> Steps[Tensor]:
        """Return (n, d) embeddings of the questions of whoever asks: a client's training rows, or the public ones."""
        if self.embedder is None:
            found: Tensor = yield Embed(None, pool="mean")
            return found
        pairs: Sequence[Pair] = yield Texts()
        return embedded(self.embedder.expanduser(), [pair.question for pair in pairs])


def _too_few(retrieve: int, clients: int, public: int) -> str:
    return (
        f"algorithm.retrieve={retrieve} rows for each of {clients} clients are {retrieve * clients}, and the server "
        f"has {public}; raise data.public, or lower algorithm.retrieve to at most {public // clients}"
    )
