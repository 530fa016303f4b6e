"""Which client holds rows of which kind, kept beside the split so that it can be drawn without the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fedloom.data.federation import Federation
from fedloom.data.rows import Row

LARGEST = 60
"""Kinds that are worth counting; a field with more distinct values says nothing in a chart."""
LOOKED_AT = 20_000
"""Rows that decide which field is told."""


def composition(federation: Federation, key: str | None) -> dict[str, Any]:
    """Return the content of composition.json.

    Args:
        federation: the split.
        key: the field that the rows were split by; None, or one with too many values: the field that divides best.

    Returns:
        `key`: the field, or null where no field has few values; `values`: its values, the most frequent first;
        `counts`: client -> rows of each value.
    """
    key = _telling(federation.rows, key)
    if key is None:
        return {"key": None, "values": [], "counts": {}}
    values = Counter(row.fields.get(key, "") for row in federation.rows)
    order = [value for value, _ in values.most_common()]
    counts = {}
    for client, data in federation.clients.items():
        own = Counter(federation.rows[i].fields.get(key, "") for i in data.all.tolist())
        counts[client] = [own.get(value, 0) for value in order]
    return {"key": key, "values": order, "counts": counts}


def _telling(rows: Sequence[Row], key: str | None) -> str | None:
    """Return the field to tell: the given one, else that with most values among those with few."""
    looked = rows[:LOOKED_AT]
    names = dict.fromkeys(name for row in looked for name in row.fields)
    sizes = {name: len({row.fields.get(name, "") for row in looked}) for name in names}
    fitting = {name: size for name, size in sizes.items() if 2 <= size <= LARGEST}
    if key in fitting:
        return key
    return max(fitting, key=fitting.__getitem__) if fitting else None
