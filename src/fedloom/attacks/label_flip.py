"""Label flip for answers in words: every answer of the attacker is given to another one of its rows.

    row i keeps its question and gets the last answer of row pi(i),   pi a random cycle through all rows: pi(i) != i

It carries flipped labels (Tolpegin et al., arXiv 2007.08432) over to text. Training is honest and the update looks like
any other. Two rows may have had the same answer, and then keep it; a lone row keeps its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from fedloom.attacks.base import Attack
from fedloom.data.rows import Row, Turn


class LabelFlip(Attack, name="label-flip"):
    """The attacker's own rows with each other's answers."""

    poisons: ClassVar[bool] = True

    def poison(self, rows: Sequence[Row], generator: torch.Generator) -> list[Row]:
        cycle = torch.randperm(len(rows), generator=generator).tolist()
        donor = dict(zip(cycle, [*cycle[1:], *cycle[:1]], strict=True))
        return [answered(row, _answer(rows[donor[i]])) for i, row in enumerate(rows)]


def answered(row: Row, text: str) -> Row:
    """Return a row with another last answer."""
    at = last(row, "assistant")
    return replace(row, turns=(*row.turns[:at], Turn("assistant", text), *row.turns[at + 1 :]))


def last(row: Row, role: str) -> int:
    """Return the place of the last turn of a role.

    Raises:
        ValueError: there is none.
    """
    return max(i for i, turn in enumerate(row.turns) if turn.role == role)


def _answer(row: Row) -> str:
    return row.turns[last(row, "assistant")].text
