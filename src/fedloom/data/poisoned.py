"""Further rows beside those of a federation, encoded as its own are, such as the poisoned ones of attackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedloom.data.encode import Encoded, encode_spans, render
from fedloom.data.federation import Data
from fedloom.data.rows import Row
from fedloom.types import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def extended(
    encoded: Encoded, rows: Mapping[str, Sequence[Row]], data: Data, tokenizer: PreTrainedTokenizerBase
) -> tuple[Encoded, list[Row], dict[str, np.ndarray]]:
    """Return the examples with further ones behind them, those rows, and where each owner's are; nothing is cached.

    Args:
        encoded: stays as it is.  rows: owner -> its further rows.
        data: says how they become text; those that are too long are left out.

    Raises:
        DataError: rows cannot be rendered, or none of an owner's is left.
    """
    parts, added, where, count = [encoded], list[Row](), {}, len(encoded)
    for owner, own in rows.items():
        try:
            spans = render(own, tokenizer, data.template, data.system)
            new, kept, _ = encode_spans(spans, tokenizer, data.max_tokens, None)
        except DataError as error:
            raise DataError(f"attacks: the poisoned rows of {owner}: {error}") from error
        where[owner] = np.arange(count, count + len(new))
        count += len(new)
        parts.append(new)
        added += [own[i] for i in kept]
    return Encoded.joined(parts), added, where
