"""Look-ups in small tables, and values taken out of small JSON objects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from fedloom.data.tasks.phrasing import Pair, mixed, phrase
from fedloom.data.tasks.words import CITIES, COLOURS, GROUPS, JOBS, NAMES, THINGS

_NUMBERS = tuple(str(number) for number in range(5, 100))
_AGES = tuple(str(number) for number in range(20, 66))
_PRICES = tuple(f"${number}" for number in range(2, 80))
_CLOCK = tuple(f"{hour:02d}:{minute:02d}" for hour in range(6, 23) for minute in range(0, 60, 5))
_CODES = tuple(f"{letter}{number}" for letter in "ABCDEFGH" for number in range(1, 13))


@dataclass(frozen=True, slots=True)
class _Theme:
    """What a table is about: the name and values of its first column, and its further columns."""

    key: str
    keys: Sequence[str]
    columns: tuple[tuple[str, Sequence[str]], ...]


_THEMES: tuple[_Theme, ...] = (
    _Theme("person", NAMES, (("age", _AGES), ("city", CITIES), ("job", JOBS), ("desk", _CODES))),
    _Theme("item", tuple(s for s, _ in THINGS), (("price", _PRICES), ("stock", _NUMBERS), ("shelf", _CODES))),
    _Theme("destination", CITIES, (("gate", _CODES), ("departure", _CLOCK), ("capacity", _NUMBERS))),
    _Theme("animal", GROUPS["animals"], (("weight", _NUMBERS), ("cage", _CODES), ("keeper", NAMES))),
    _Theme("team", CITIES, (("coach", NAMES), ("score", _NUMBERS), ("hall", _CODES))),
    _Theme("course", GROUPS["sports"], (("teacher", NAMES), ("start", _CLOCK), ("room", _CODES))),
)
_CELL = (
    "{table}\nWhat is the {column} of the {key} {row}?",
    "{table}\nLook up the {column} for {row}.",
    "{table}\nWhich {column} belongs to {row}?",
    "Read the {column} of {row} from this table.\n{table}",
    "What {column} does the table give for {row}?\n{table}",
    "{table}\nGive the {column} in the row of {row}.",
)
_ROW = (
    "{table}\nWhich {key} has the {column} {value}?",
    "{table}\nFind the {key} with the {column} {value}.",
    "Which {key} is listed with the {column} {value}?\n{table}",
)
_VALUE = (
    '{text}\nWhat is the value of "{key}"? {form}',
    'Extract "{key}" from this JSON.\n{text}\n{form}',
    '{text}\nGive the value stored under "{key}". {form}',
    'Read the field "{key}". {form}\n{text}',
    '{text}\nWhich value does "{key}" have? {form}',
)
_INNER = (
    '{text}\nWhat is the value of "{key}" inside "{outer}"? {form}',
    'Extract "{key}" of "{outer}" from this JSON.\n{text}\n{form}',
    '{text}\nGo to "{outer}" and read "{key}". {form}',
)
_AS_JSON = (
    "Answer in JSON.",
    "Return it as JSON, with quotes around strings.",
    "Write it exactly as in the JSON.",
    "Keep the JSON notation.",
)
_FIELDS: Mapping[str, Sequence[object]] = {
    "name": NAMES,
    "city": CITIES,
    "job": JOBS,
    "colour": COLOURS,
    "item": tuple(singular for singular, _ in THINGS),
    "animal": GROUPS["animals"],
    "time": _CLOCK,
    "code": _CODES,
    "age": range(20, 66),
    "price": range(2, 60),
    "count": range(2, 100),
    "room": range(100, 400),
    "active": (True, False),
    "paid": (True, False),
}
_KEYS = tuple(_FIELDS)
_LISTS: tuple[tuple[str, Sequence[str]], ...] = (
    ("tags", COLOURS),
    ("pets", GROUPS["animals"]),
    ("stops", CITIES),
    ("fruits", GROUPS["fruits"]),
    ("guests", NAMES),
)
_OUTER = ("details", "entry", "info", "record")


def table_lookup(rng: Random) -> Pair:
    """Draw a small table and a question that one of its cells answers.

    Args:
        rng: source of the wording and of the table.

    Returns:
        Prompt and answer: the cell's text.
    """
    return mixed(rng, (_cell, _cell, _cell, _cell, _row))


def json_extraction(rng: Random) -> Pair:
    """Draw a JSON object and ask for one of its values.

    Args:
        rng: source of the wording and of the object.

    Returns:
        Prompt and answer: the value in JSON notation, so strings carry their quotes.
    """
    return mixed(rng, (_value, _value, _value, _list, _inner))


def _table(rng: Random) -> tuple[_Theme, list[str], list[list[str]]]:
    """Draw a theme, one or two of its columns and three rows; no value stands twice in a column."""
    theme = rng.choice(_THEMES)
    columns = rng.sample(theme.columns, rng.choice((1, 1, 2)))
    cells = [rng.sample(theme.keys, 3), *(rng.sample(values, 3) for _, values in columns)]
    return theme, [name for name, _ in columns], [list(row) for row in zip(*cells, strict=True)]


def _drawn(rng: Random, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in one of three plain forms."""
    mark, edge = rng.choice(((" | ", ""), (", ", ""), (" | ", "|")))
    lines = [mark.join(line) for line in (head, *rows)]
    return "\n".join(f"{edge} {line} {edge}" if edge else line for line in lines)


def _cell(rng: Random) -> Pair:
    """Ask for the cell of a row and a column."""
    theme, columns, rows = _table(rng)
    row, column = rng.choice(rows), rng.randrange(len(columns))
    table = _drawn(rng, [theme.key, *columns], rows)
    return phrase(rng, _CELL, table=table, key=theme.key, row=row[0], column=columns[column]), row[column + 1]


def _row(rng: Random) -> Pair:
    """Ask for the row that holds a value."""
    theme, columns, rows = _table(rng)
    row, column = rng.choice(rows), rng.randrange(len(columns))
    table = _drawn(rng, [theme.key, *columns], rows)
    return phrase(rng, _ROW, table=table, key=theme.key, value=row[column + 1], column=columns[column]), row[0]


def _field(rng: Random, key: str) -> object:
    """Draw a value that suits a key."""
    return rng.choice(_FIELDS[key])


def _shuffled(rng: Random, fields: dict[str, object]) -> str:
    """Write the fields in random order as JSON."""
    keys = rng.sample(sorted(fields), len(fields))
    return json.dumps({key: fields[key] for key in keys})


def _value(rng: Random) -> Pair:
    """Ask for a field of a flat object."""
    fields = {key: _field(rng, key) for key in rng.sample(_KEYS, rng.randint(2, 4))}
    key = rng.choice(sorted(fields))
    text = _shuffled(rng, fields)
    return phrase(rng, _VALUE, text=text, key=key, form=rng.choice(_AS_JSON)), json.dumps(fields[key])


def _inner(rng: Random) -> Pair:
    """Ask for a field of an object inside the object; another field stands outside."""
    keys = rng.sample(_KEYS, 3)
    inside = {key: _field(rng, key) for key in keys[:2]}
    outer, key = rng.choice(_OUTER), rng.choice(keys[:2])
    text = _shuffled(rng, {outer: inside} | {key: _field(rng, key) for key in keys[2:]})
    return phrase(rng, _INNER, text=text, key=key, outer=outer, form=rng.choice(_AS_JSON)), json.dumps(inside[key])


def _list(rng: Random) -> Pair:
    """Ask for a whole list."""
    key, pool = rng.choice(_LISTS)
    values = rng.sample(pool, 2)
    text = _shuffled(rng, {key: values} | {other: _field(rng, other) for other in rng.sample(_KEYS, 2)})
    return phrase(rng, _VALUE, text=text, key=key, form=rng.choice(_AS_JSON)), json.dumps(values)
