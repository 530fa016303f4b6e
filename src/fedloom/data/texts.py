"""Rows as plain texts, and plain texts as rows: what algorithms that work on the data themselves ask for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedloom.data.encode import Encoded, encode_spans, render
from fedloom.data.federation import Data
from fedloom.data.rows import Row, Turn
from fedloom.data.templates import with_system
from fedloom.types import DataError, Pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOTHING = Encoded(np.zeros(0, np.int32), np.zeros(0, np.bool_), np.zeros(1, np.int64), np.zeros(0, np.int64))


@dataclass(frozen=True, slots=True)
class TextDesk:
    """Turns rows into pairs and pairs into examples, as the recipe's data are.

    Attributes:
        rows: those that the examples stand for.  data: says how they become text.
    """

    rows: Sequence[Row]
    data: Data
    tokenizer: PreTrainedTokenizerBase

    def pairs(self, indices: Iterable[int]) -> tuple[Pair, ...]:
        """Return the first question and the first answer of each row."""
        return tuple(Pair(_first(self.rows[i], "user"), _first(self.rows[i], "assistant")) for i in indices)

    def encode(self, pairs: Sequence[Pair]) -> tuple[Encoded, list[int]]:
        """Return the examples of pairs, and which pairs they are; what is too long or without a label is none."""
        rows = [Row(str(i), (Turn("user", one.question), Turn("assistant", one.answer))) for i, one in enumerate(pairs)]
        spans = render(rows, self.tokenizer, self.data.template, self.data.system)
        try:
            encoded, kept, _ = encode_spans(spans, self.tokenizer, self.data.max_tokens, None)
        except DataError:
            return NOTHING, []  # not one pair is short enough
        return encoded, kept

    def prompts(self, questions: Iterable[str]) -> list[str]:
        """Return what the model reads where a user asks a question, up to where it answers."""
        template = self.data.template
        asked = ((Turn("user", question),) for question in questions)
        return [template.prompt(with_system(turns, self.data.system), self.tokenizer) for turns in asked]


def _first(row: Row, role: str) -> str:
    return next((turn.text for turn in row.turns if turn.role == role), "")
