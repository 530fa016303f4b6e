"""The contract of an attack: chosen clients train on poisoned rows, or send other updates than they trained.

An attacker does not run the transforms of honest clients on what it forges: its update is replaced where the server
has decoded it. What is forged is the change of the shared weights (group `params`); other groups stay as trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor

from fedloom import seeds
from fedloom.data.rows import Row
from fedloom.parts import Part
from fedloom.server.aggregate import Around
from fedloom.types import Bundle, ClientUpdate, Message, RecipeError, Tensors, suggest


@dataclass(frozen=True, slots=True)
class Scene:
    """What an attacker knows of a round.

    Attributes:
        round: from 0.
        cohort: the clients that take part.  attackers: the clients of any attack, in the cohort or not.
        around: what the server's aggregator knows.  lr: the server's learning rate.
        generator: the random stream of the attack in this round.
    """

    round: int
    cohort: Sequence[str]
    attackers: frozenset[str]
    around: Around
    lr: float
    generator: torch.Generator

    @property
    def f(self) -> int:
        """The number of attackers in the cohort."""
        return sum(name in self.attackers for name in self.cohort)


class Attack(Part, family=True):
    """What chosen clients do to a federation."""

    omniscient: ClassVar[bool] = False
    """Whether it looks at the updates of honest clients, so that all updates of a round are held at once."""
    poisons: ClassVar[bool] = False
    """Whether it changes the attackers' training rows."""

    clients: tuple[str, ...] = ()
    """Who attacks, by name; empty: a `share` of the clients, drawn from the seed."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the clients that attack, rounded up, where none is named."""
    start: NonNegativeInt = 0
    """First round of the attack, counted from 0."""

    @model_validator(mode="after")
    def _rows_have_no_start(self) -> Self:
        if self.poisons and self.start:
            raise ValueError(
                "start: poisoned rows are there from the first round on; set it to 0 (to boost an update later, add "
                "the attack scaling with the same clients)"
            )
        return self

    def on(self, clients: Sequence[str], seed: int) -> Self:
        """Return the attack with its attackers named.

        Args:
            clients: who may take part, in client order.

        Raises:
            RecipeError: a named attacker is no client, or nobody would be left who is honest.
        """
        if odd := sorted(set(self.clients) - set(clients)):
            raise RecipeError(
                f"attacks: there is no client {odd[0]!r}{suggest(odd[0], clients)}; clients: "
                f"{', '.join(list(clients)[:10])}"
            )
        if self.clients:
            return self
        count = min(len(clients) - 1, math.ceil(self.share * len(clients) - 1e-9))
        if count == 0:
            raise RecipeError(f"attacks: {self.part_name} needs an honest client beside it; raise data.clients")
        drawn = seeds.numpy_generator(seed, None, None, f"attackers:{self.part_name}").permutation(len(clients))[:count]
        return self.model_copy(update={"clients": tuple(clients[i] for i in sorted(drawn.tolist()))})

    def poison(self, rows: Sequence[Row], generator: torch.Generator) -> list[Row]:
        """Return what an attacker trains on in place of its own training rows: as many rows."""
        return list(rows)

    def forged(self, own: ClientUpdate, honest: Sequence[ClientUpdate], scene: Scene) -> ClientUpdate:
        """Return what an attacker sends.

        Args:
            own: what it trained.  honest: the updates of those who are no attackers, for an omniscient attack; else
                empty.
        """
        return own

    def forge(self, updates: Iterable[ClientUpdate], scene: Scene) -> Iterator[ClientUpdate]:
        """Yield the updates, those of attackers replaced from round `start` on.

        In a round without an honest update an omniscient attack has nothing to look at, and all is sent as trained.
        """
        if scene.round < self.start or type(self).forged is Attack.forged:
            yield from updates
            return
        held = list(updates) if self.omniscient else updates
        honest = [update for update in held if update.client not in scene.attackers] if self.omniscient else []
        blind = self.omniscient and not honest
        for update in held:
            attacks = update.client in self.clients and not blind
            yield self.forged(update, honest, scene) if attacks else update


def changed(own: ClientUpdate, change: Callable[[str, Tensor], Tensor]) -> ClientUpdate:
    """Return an update with another change of the shared weights.

    Args:
        change: (name, what was trained) -> what is sent in its place; the dtype stays that of what was trained.
    """
    sent = {name: change(name, t).to(t.dtype) for name, t in shared(own).items()}
    return replace(own, message=Message({**own.message.groups, "params": Bundle(sent)}))


def shared(update: ClientUpdate) -> Tensors:
    """Return the change of the shared weights in an update.

    Raises:
        RecipeError: the algorithm sends none.
    """
    if "params" not in update.message.groups:
        raise RecipeError("attacks: the algorithm sends no shared weights (group params) to forge; set attacks=[]")
    return update.message.groups["params"].tensors


def spread(honest: Sequence[ClientUpdate], name: str) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (of the n values, not of a larger whole) of a shared tensor, in float64."""
    stacked = torch.stack([shared(update)[name].double() for update in honest])
    return stacked.mean(0), stacked.std(0, correction=0)
