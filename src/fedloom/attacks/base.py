"""The contract of an attack: chosen clients train on poisoned rows, or send other updates than they trained.

An attacker does not run the transforms of honest clients on what it forges: its update is replaced where the server
has decoded it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field, NonNegativeInt

from fedloom import seeds
from fedloom.data.rows import Row
from fedloom.parts import Part
from fedloom.server.aggregate import Around
from fedloom.types import ClientUpdate, RecipeError, suggest


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

    def on(self, clients: Sequence[str], seed: int) -> Self:
        """Return the attack with its attackers named.

        Args:
            clients: who may take part, in client order.

        Raises:
            RecipeError: a named attacker is no client.
        """
        if odd := sorted(set(self.clients) - set(clients)):
            raise RecipeError(
                f"attacks: there is no client {odd[0]!r}{suggest(odd[0], clients)}; clients: "
                f"{', '.join(list(clients)[:10])}"
            )
        if self.clients:
            return self
        count = min(len(clients) - 1, -int(-self.share * len(clients) // 1))
        drawn = seeds.numpy_generator(seed, None, None, f"attackers:{self.part_name}").permutation(len(clients))[:count]
        return self.model_copy(update={"clients": tuple(clients[i] for i in sorted(drawn.tolist()))})

    def poison(self, rows: Sequence[Row], generator: torch.Generator) -> list[Row]:
        """Return what an attacker trains on in place of its own training rows: as many rows."""
        return list(rows)

    def forged(
        self, own: ClientUpdate, honest: Sequence[ClientUpdate], around: Around, generator: torch.Generator
    ) -> ClientUpdate:
        """Return what an attacker sends.

        Args:
            own: what it trained.  honest: the other clients' updates, for an omniscient attack; else empty.
            around: what the server's aggregator knows.
        """
        return own

    def forge(
        self, updates: Iterable[ClientUpdate], around: Around, round_: int, generator: torch.Generator
    ) -> Iterator[ClientUpdate]:
        """Yield the updates, those of attackers replaced; from round `start` on."""
        if round_ < self.start or type(self).forged is Attack.forged:
            yield from updates
            return
        held = list(updates) if self.omniscient else updates
        honest = [u for u in held if u.client not in self.clients] if self.omniscient else []
        for update in held:
            yield self.forged(update, honest, around, generator) if update.client in self.clients else update
