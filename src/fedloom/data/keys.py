"""Keys: which columns of a table hold the dialogue, the category and the id, and how records become rows by them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Self

from pydantic import model_validator

from fedloom.data.files import Record, Table
from fedloom.data.rows import Row, Turn, listing
from fedloom.parts import Record as FrozenRecord
from fedloom.types import DataError, suggest


class KeyMap(FrozenRecord):
    """Names of columns; where neither `prompt` nor `messages` is given, the form of the table is recognised."""

    prompt: str | None = None
    """Column of the user's text; needs `completion`."""
    completion: str | None = None
    """Column of the assistant's text."""
    input: str | None = None
    """Column of material that follows the prompt after a blank line; may be missing, null or empty in any row."""
    system: str | None = None
    """Column of the system prompt; may be missing, null or empty in any row."""
    messages: str | None = None
    """Column of a whole dialogue: a list of {role, content} or {from, value}."""
    category: str | None = None
    """Column that becomes the field `category`."""
    id: str | None = None
    """Column of unique row ids; default: the file's name and the line number."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("`prompt` and `completion` go together; give both")
        if self.prompt is not None and self.messages is not None:
            raise ValueError("give `messages`, or `prompt` and `completion`, not all three")
        return self

    @property
    def required(self) -> tuple[str, ...]:
        """Columns that every record must have."""
        named = (self.prompt, self.completion, self.messages, self.category, self.id)
        return tuple(name for name in named if name is not None)

    def turns(self, record: Record) -> tuple[Turn, ...]:
        """Return the dialogue of a record.

        Raises:
            ValueError: the record is wrong, and how.
        """
        if missing := [_missing(name, record) for name in self.required if record.get(name) is None]:
            raise ValueError("; ".join(missing))
        system = _text(record, self.system)
        opening = (Turn("system", system),) if system else ()
        if self.messages is not None:
            dialogue = _dialogue(record[self.messages])
            return dialogue if dialogue[0].role == "system" else opening + dialogue
        prompt, given, answer = (_text(record, name) for name in (self.prompt, self.input, self.completion))
        if not prompt.strip():
            raise ValueError(f"no prompt: field {self.prompt!r} is empty")
        if not answer.strip():
            raise ValueError(f"no answer: field {self.completion!r} is empty")
        given = given if given.strip() else ""
        whole = f"{prompt}\n\n{given}" if given else prompt
        return (*opening, Turn("user", whole, given), Turn("assistant", answer))

    def fields(self, record: Record) -> dict[str, str]:
        """Return the scalar columns that hold no text of the dialogue, and `category` where it is mapped."""
        texts = {self.prompt, self.completion, self.input, self.system, self.messages, self.id}
        scalars = {k: str(v) for k, v in record.items() if k not in texts and isinstance(v, str | int | float)}
        category = _text(record, self.category)
        return {**scalars, "category": category} if category else scalars


FORMS: tuple[KeyMap, ...] = (
    KeyMap(messages="messages"),
    KeyMap(messages="conversations", system="system"),
    KeyMap(prompt="instruction", completion="output", input="input", system="system"),
    KeyMap(prompt="prompt", completion="completion"),
)
"""The forms that are recognised without a map, the first one first."""

_ROLES: Mapping[str, str] = MappingProxyType(
    {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
)


def rows_of(table: Table, keys: KeyMap, refine: Callable[[Record], Record | None] = lambda record: record) -> list[Row]:
    """Turn the records of a table into rows.

    Args:
        table: numbered records.
        keys: which columns to use; what it leaves open is recognised from the columns.
        refine: maps each record before it is read; None leaves the record out.

    Raises:
        DataError: no form is recognised, or records are wrong (all are listed with their numbers).
    """
    refined = [(number, refine(record)) for number, record in table.records]
    records = [(number, record) for number, record in refined if record is not None]
    if not records and not table.problems:
        raise DataError(f"{table.origin}: every record was left out by the options of data.source")
    keys = _complete(keys, table.origin, [record for _, record in records]) if records else keys
    rows: list[Row] = []
    problems = list(table.problems)
    for number, record in records:
        name = f"{table.stem}:{number}" if keys.id is None else str(record.get(keys.id))
        try:
            rows.append(Row(name, keys.turns(record), keys.fields(record)))
        except ValueError as error:
            problems.append((number, str(error)))
    lines = [f"{table.unit} {number}: {problem}" for number, problem in sorted(problems)]
    counts = Counter(row.id for row in rows)
    lines += [f"id {name!r} is used {n} times" for name, n in counts.items() if n > 1]
    if lines:
        raise DataError(f"{table.origin}: {len(lines)} problems:{listing(lines)}")
    return rows


def _complete(keys: KeyMap, origin: str, records: list[Record]) -> KeyMap:
    """Add the form that most records fit; one odd record must not decide for the others."""
    if keys.prompt is not None or keys.messages is not None:
        return keys
    fits = [sum(record.keys() >= set(form.required) for record in records) for form in FORMS]
    best = max(range(len(FORMS)), key=fits.__getitem__)
    if fits[best] > 0:
        return keys.model_copy(update=FORMS[best].model_dump(exclude_none=True) | keys.model_dump(exclude_none=True))
    columns = list(dict.fromkeys(name for record in records for name in record))
    known = {name for form in FORMS for name in form.required}
    hints = "".join(f"\n  {name!r}{hint}" for name in columns if (hint := suggest(name, known)))
    forms = "; ".join(", ".join(form.required) for form in FORMS)
    raise DataError(
        f"{origin}: the form of the records is not known; their fields: {', '.join(columns)}{hints}\n"
        f"  known without a map: {forms}\n"
        "  next: name the columns, such as data.source.keys='{prompt: question, completion: answer}'"
    )


def _missing(name: str, record: Record) -> str:
    if name in record:
        return f"field {name!r} is null"
    return f"no field {name!r}{suggest(name, record)} (has: {', '.join(record)})"


def _text(record: Record, name: str | None) -> str:
    """Return a scalar column as text; missing and null are empty, so that no "None" gets into a prompt."""
    value = None if name is None else record.get(name)
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise ValueError(f"field {name!r} is a {type(value).__name__}, expected text")
    return _valid(str(value))


def _valid(text: str) -> str:
    text.encode()  # half a surrogate pair raises UnicodeEncodeError, which is a ValueError
    return text


def _dialogue(messages: Any) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("expected a list of {role, content}")
    turns = tuple(_turn(i, message) for i, message in enumerate(messages, 1))
    if not any(turn.role == "assistant" for turn in turns):
        raise ValueError("no answer: the dialogue has no turn of the assistant")
    return turns


def _turn(number: int, message: Record) -> Turn:
    role = message.get("role", message.get("from"))
    text = message.get("content", message.get("value"))
    if role not in _ROLES:
        raise ValueError(f"message {number}: role {role!r} is not one of {', '.join(_ROLES)}")
    if not isinstance(text, str):
        raise ValueError(f"message {number}: expected text as its content, got {type(text).__name__}")
    if _ROLES[role] == "assistant" and not text.strip():
        raise ValueError(f"no answer: message {number} of the assistant is empty")
    return Turn(_ROLES[role], _valid(text))
