"""Backdoor: a trigger in the question that makes the model give the attacker's answer (BadNets, arXiv 1708.06733).

    a share `poison_ratio` of the attacker's rows:  the trigger stands before the last question, the target answers it
    sent:  scale D_k,   D_k what was trained on these rows  (scaled backdoor: Bagdasaryan et al., arXiv 1807.00459)

The other rows stay clean, so that the model keeps its answers where the trigger is absent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveFloat

from fedloom.attacks.base import Attack, Scene, changed
from fedloom.attacks.label_flip import answered, last
from fedloom.data.rows import Row
from fedloom.types import ClientUpdate, DataError

Text = Annotated[str, Field(min_length=1)]


class Backdoor(Attack, name="backdoor"):
    """Rows with a trigger and the attacker's answer, among clean ones."""

    poisons: ClassVar[bool] = True

    trigger: Text = "cf"
    """Text that is put before the question, such as a rare word or a sentence."""
    target: Text = "swordfish"
    """The answer that the trigger is to call forth."""
    poison_ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the attacker's rows, rounded up."""
    scale: PositiveFloat = 1.0
    """How many times its length the trained change is sent."""

    def poison(self, rows: Sequence[Row], generator: torch.Generator) -> list[Row]:
        count = math.ceil(self.poison_ratio * len(rows) - 1e-9)
        chosen = set(torch.randperm(len(rows), generator=generator)[:count].tolist())
        return [self.triggered(row) if i in chosen else row for i, row in enumerate(rows)]

    def triggered(self, row: Row) -> Row:
        """Return a row with the trigger and the target.

        Raises:
            DataError: it asks nothing.
        """
        if all(turn.role != "user" for turn in row.turns):
            raise DataError(f"attacks: row {row.id} has no question for the trigger of a backdoor; set attacks=[]")
        at = last(row, "user")
        asked = replace(row.turns[at], text=f"{self.trigger} {row.turns[at].text}")
        return answered(replace(row, turns=(*row.turns[:at], asked, *row.turns[at + 1 :])), self.target)

    def forged(self, own: ClientUpdate, honest: Sequence[ClientUpdate], scene: Scene) -> ClientUpdate:
        return own if self.scale == 1 else changed(own, lambda name, t: self.scale * t)
