"""Rows: the one form that every source delivers and every later step reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedloom.types import DataError, suggest


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a dialogue.

    Attributes:
        role: "system", "user" or "assistant".
        text: the whole message.
        input: the end of a user's `text` that is material rather than instruction, after a blank line; often "".
            Only templates that set the two apart read it.
    """

    role: str
    text: str
    input: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One training example.

    Attributes:
        id: unique within its source; stands for the row in split.json.
        turns: the dialogue.
        fields: scalar columns, such as the category, by which partitions split.
    """

    id: str
    turns: tuple[Turn, ...]
    fields: Mapping[str, str] = field(default_factory=dict)


def column(rows: Sequence[Row], key: str, knob: str) -> np.ndarray:
    """Return the value of one field for every row.

    Args:
        rows: n rows.
        key: name of the field.
        knob: the recipe's key that asked for the field, for the error message.

    Returns:
        An array of n strings.

    Raises:
        DataError: rows lack the field.
    """
    missing = [row.id for row in rows if key not in row.fields]
    if not missing:
        return np.array([row.fields[key] for row in rows], dtype=object)
    known = sorted({name for row in rows for name in row.fields})
    if key not in known:
        have = f"the rows have: {', '.join(known)}" if known else "the rows have no fields at all"
        raise DataError(f"{knob}: no row has a field {key!r}{suggest(key, known)}; {have}")
    problems = [f"row {name}" for name in missing]
    raise DataError(f"{knob}: {len(missing)} of {len(rows)} rows have no field {key!r}:{listing(problems)}")


def listing(problems: Sequence[str], cap: int = 10) -> str:
    """Return problems as indented lines, the first `cap` of them and then a count."""
    more = [f"... and {len(problems) - cap} more"] if len(problems) > cap else []
    return "".join(f"\n  {problem}" for problem in [*problems[:cap], *more])
