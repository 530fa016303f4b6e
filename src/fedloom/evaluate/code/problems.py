"""Problem files: found by name, below $FEDLOOM_DATA or on the hub, and checked for the fields they need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedloom.data.files import Table, read_table
from fedloom.data.sources import HubSource
from fedloom.home import data_home
from fedloom.types import DataError, suggest


def read(evaluator: str, path: Path | None, local: str, hub: HubSource | None, fields: Sequence[str]) -> list[Any]:
    """Return the records of a problem file.

    Args:
        evaluator: name for messages.  path: what the recipe names, or None.
        local: the file below $FEDLOOM_DATA.  hub: where else it is, or None.  fields: what each record must have.

    Raises:
        DataError: it is nowhere, damaged, or a record lacks a field.
    """
    table = _table(evaluator, path, local, hub)
    if table.problems:
        number, problem = table.problems[0]
        raise DataError(f"{table.origin}, {table.unit} {number}: {problem}")
    for number, record in table.records:
        if gone := [field for field in fields if record.get(field) is None]:
            raise DataError(
                f"{table.origin}, {table.unit} {number}: evaluator {evaluator} needs the field {gone[0]!r}"
                f"{suggest(gone[0], record)} (there: {', '.join(record)})"
            )
    return [record for _, record in table.records]


def _table(evaluator: str, path: Path | None, local: str, hub: HubSource | None) -> Table:
    home = data_home()
    if path is not None:
        return read_table(path.expanduser())
    if home is not None and (home / local).is_file():
        return read_table(home / local)
    below = f"put the file at $FEDLOOM_DATA/{local}, or name it with the evaluator's path: FILE"
    if hub is None:
        raise DataError(f"evaluator {evaluator}: no problems found; {below}")
    try:
        return hub.table()
    except DataError as error:
        raise DataError(f"evaluator {evaluator}: {error}\n  {below}") from error
