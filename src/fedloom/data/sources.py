"""Sources: where rows come from. The built-in task suite, a file, or a data set of the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import PositiveInt, field_validator

from fedloom.data import tasks
from fedloom.data.files import SUFFIXES, Table, data_suffix, read_table
from fedloom.data.keys import KeyMap, rows_of
from fedloom.data.rows import Row, Turn
from fedloom.parts import Part
from fedloom.types import DataError, suggest


class Source(Part, family=True):
    """Where rows come from; the name of a data file or a hub id ("org/name") is a source too."""

    def rows(self, seed: int) -> list[Row]:
        """Return all rows, in an order that depends on `seed` alone.

        Raises:
            DataError: the rows cannot be found, read or understood.
        """
        raise NotImplementedError

    def describe(self) -> str:
        """Say in one line where the rows come from, and whether they only stand in for what was asked."""
        raise NotImplementedError

    @classmethod
    def from_unknown(cls, name: str) -> Mapping[str, Any] | None:
        """Read a name as a data file or a hub id; see `Part.from_unknown`."""
        if data_suffix(name) or Path(name).is_file():
            return {"name": "file", "path": name}
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            return {"name": "hub", "id": name}
        return None


class TaskSource(Source, name="tasks"):
    """The built-in task suite: short instructions with verifiable answers, made from the seed; needs no download."""

    rows_per_category: PositiveInt = 60
    """Rows drawn for each category."""
    categories: tuple[str, ...] | None = None
    """Categories to draw from; all of them by default."""

    @field_validator("categories")
    @classmethod
    def _known(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in names or ():
            if name not in tasks.CATEGORIES:
                known = ", ".join(tasks.CATEGORIES)
                raise ValueError(f"there is no category {name!r}{suggest(name, tasks.CATEGORIES)} (known: {known})")
        if names is not None and not 0 < len(names) == len(set(names)):
            raise ValueError("expected at least one category, each once")
        return names

    def rows(self, seed: int) -> list[Row]:
        """Draw the training split of the suite; see `Source.rows`."""
        names = self.categories or tasks.CATEGORIES
        drawn = [item for name in names for item in tasks.items(name, "train", self.rows_per_category, seed)]
        return [
            Row(item.id, (Turn("user", item.prompt), Turn("assistant", item.answer)), {"category": item.category})
            for item in drawn
        ]

    def describe(self) -> str:
        """Name the suite and its size; see `Source.describe`."""
        count = len(self.categories or tasks.CATEGORIES)
        return f"built-in task suite ({count} categories x {self.rows_per_category} rows)"


class FileSource(Source, name="file"):
    """A json, jsonl, csv or parquet file in Alpaca, prompt/completion or chat form, or of any columns by `keys`."""

    path: Path
    """The file; json, jsonl and csv may be gzipped."""
    keys: KeyMap = KeyMap()
    """Which columns to use, where the form is not a known one."""

    def rows(self, seed: int) -> list[Row]:
        """Read the file; see `Source.rows`."""
        return rows_of(read_table(self.path.expanduser()), self.keys)

    def describe(self) -> str:
        """Name the file; see `Source.describe`."""
        return f"file {self.path}"


class HubSource(Source, name="hub"):
    """A data set of the Hugging Face hub, from its cache where it was loaded before."""

    id: str
    """Owner and name, such as openai/gsm8k."""
    subset: str | None = None
    """Configuration of the data set, where it has several."""
    split: str = "train"
    """Split of the data set, in the notation of `datasets` ("train", "train[:10%]", ...)."""
    revision: str | None = None
    """Branch, tag or commit."""
    keys: KeyMap = KeyMap()
    """Which columns to use, where the form is not a known one."""

    def rows(self, seed: int) -> list[Row]:
        """Load the data set; see `Source.rows`."""
        return rows_of(self.table(), self.keys)

    def table(self) -> Table:
        """Load the data set as a table.

        Raises:
            DataError: the data set cannot be had; names every other way to provide it.
        """
        import datasets

        try:
            records = datasets.load_dataset(self.id, self.subset, split=self.split, revision=self.revision).to_list()
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"hub data set {self.id} ({self.split}): {error}\n{_WAYS}{_offline()}") from error
        return Table(f"hub data set {self.id}", self.id, "row", list(enumerate(records, 1)))

    def describe(self) -> str:
        """Name the data set; see `Source.describe`."""
        subset = f", subset {self.subset}" if self.subset else ""
        return f"hub data set {self.id} ({self.split}{subset})"


_WAYS = (
    "  it can be provided in these ways:\n"
    "  - with a network: it is downloaded and kept in the cache (HF_ENDPOINT names a mirror)\n"
    "  - without one: copy the cache of a machine that has loaded it, and set HF_HOME to the copy\n"
    f"  - as a file: data.source=FILE ({', '.join(SUFFIXES)})\n"
    "  - data that needs no download: data.source=tasks"
)


def _offline() -> str:
    value = os.environ.get("HF_HUB_OFFLINE")
    return f"\n  note: HF_HUB_OFFLINE={value} is set, so the hub was not asked" if value not in {None, "", "0"} else ""
