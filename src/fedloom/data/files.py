"""Data files: json, jsonl and csv (each also gzipped) and parquet become tables of records with their places."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from fedloom.types import DataError, suggest

Record: TypeAlias = Mapping[str, Any]
Numbered: TypeAlias = Sequence[tuple[int, Record]]
Problems: TypeAlias = Sequence[tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Table:
    """Records as they were read.

    Attributes:
        origin: the file or data set, for messages.
        stem: what the ids of its rows begin with.
        unit: what `records` are numbered by: "line", "item" or "row"; numbers start at 1.
        problems: what is no record, by the same numbers; reported together with what is wrong in the records.
    """

    origin: str
    stem: str
    unit: str
    records: Numbered
    problems: Problems = ()


def read_table(path: Path) -> Table:
    """Read a data file whole.

    Args:
        path: a file that ends in one of `SUFFIXES`.

    Raises:
        DataError: missing, empty, damaged or unknown file.
    """
    suffix = data_suffix(path.name)
    if path.is_dir():
        raise DataError(f"{path}: a folder; name one data file in it ({', '.join(SUFFIXES)})")
    if not path.exists():
        near = suggest(path.name, (other.name for other in path.parent.glob("*")))
        raise DataError(f"{path}: no such file{near} (looked in {path.parent.resolve()})")
    if not suffix:
        raise DataError(f"{path}: unknown kind of data file; known endings: {', '.join(SUFFIXES)}")
    reader, unit = _READERS[suffix.removesuffix(".gz")]
    records, problems = reader(path)
    if not records and not problems:
        raise DataError(f"{path}: the file is empty; expected at least one record")
    return Table(str(path), path.name.removesuffix(suffix), unit, records, problems)


def data_suffix(name: str) -> str:
    """Return the ending that makes `name` a data file, or "" if it has none."""
    return max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default="")


def _text(path: Path) -> str:
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except EOFError:
            raise DataError(f"{path}: the gzip file is truncated; copy or download it again") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: damaged or no gzip file ({error}); copy or download it again") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def _read_jsonl(path: Path) -> tuple[Numbered, Problems]:
    records: list[tuple[int, Record]] = []
    problems: list[tuple[int, str]] = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append((number, f"not JSON ({error.msg}, column {error.colno})"))
            continue
        if isinstance(value, dict):
            records.append((number, value))
        else:
            problems.append((number, f"expected an object {{...}}, got {_kind(value)}"))
    return records, problems


def _read_json(path: Path) -> tuple[Numbered, Problems]:
    text = _text(path)
    if not text.strip():
        return [], []
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; a file with one object a line is named .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}, column {error.colno}){hint}") from None
    if not isinstance(values, list):
        raise DataError(f"{path}: expected a list of objects [{{...}}, ...], got {_kind(values)}")
    items = list(enumerate(values, 1))
    odd = [(i, value) for i, value in items if not isinstance(value, dict)]
    problems = [(i, f"expected an object {{...}}, got {_kind(value)}") for i, value in odd]
    return [(i, value) for i, value in items if isinstance(value, dict)], problems


def _read_csv(path: Path) -> tuple[Numbered, Problems]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), restkey="", strict=True)
    records: list[tuple[int, Record]] = []
    problems: list[tuple[int, str]] = []
    try:
        for record in reader:
            if "" in record or None in record.values():
                cells = len(reader.fieldnames or ())
                problems.append((reader.line_num, f"more or fewer cells than the {cells} of the header"))
            else:
                records.append((reader.line_num, record))
    except csv.Error as error:
        problems.append((reader.line_num, f"not CSV ({error})"))
    return records, problems


def _read_parquet(path: Path) -> tuple[Numbered, Problems]:
    from pyarrow import ArrowException, parquet

    try:
        return list(enumerate(parquet.read_table(path).to_pylist(), 1)), []
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged or no parquet file ({error}); copy or download it again") from None


def _kind(value: object) -> str:
    kinds = {list: "a list", str: "a text", dict: "an object", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number")


_READERS: Mapping[str, tuple[Callable[[Path], tuple[Numbered, Problems]], str]] = MappingProxyType(
    {
        ".jsonl": (_read_jsonl, "line"),
        ".json": (_read_json, "item"),
        ".csv": (_read_csv, "line"),
        ".parquet": (_read_parquet, "row"),
    }
)
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
"""Endings of data files."""
