"""What the task evaluators share: data files, which items are asked, and the walk over a regime's adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from fedloom import seeds
from fedloom.data.files import Record, read_table
from fedloom.evaluate.base import Evaluation, Sample, Using, View
from fedloom.home import data_home
from fedloom.types import DataError, Split, suggest

Scored: TypeAlias = tuple[dict[str, float], list[Sample]]


def found(evaluator: str, path: Path | None, *below: str) -> Path:
    """Return the data file of an evaluator: the one given, or the first of `below` under $FEDLOOM_DATA.

    Raises:
        DataError: there is none.
    """
    if path is not None:
        if not path.expanduser().exists():
            raise DataError(f"evaluator {evaluator}: no such file: {path}")
        return path.expanduser()
    home = data_home()
    here = next((home / name for name in below if (home / name).exists()), None) if home else None
    if here is None:
        where = f"$FEDLOOM_DATA ({home})" if home else "$FEDLOOM_DATA, which is not set"
        raise DataError(
            f"evaluator {evaluator}: its data are not below {where}; "
            f"put the file at $FEDLOOM_DATA/{below[0]}, or name it with the evaluator's path"
        )
    return here


def records(path: Path, *fields: str) -> list[Record]:
    """Return the records of a data file, each of which has the fields.

    Raises:
        DataError: with all that is wrong, each with its place.
    """
    table = read_table(path)
    wrong = list(table.problems)
    for number, record in table.records:
        if missing := [name for name in fields if record.get(name) is None]:
            wrong.append((number, f"lacks {', '.join(missing)} (has: {', '.join(record)})"))
    if wrong:
        told = "\n".join(f"  {table.unit} {number}: {problem}" for number, problem in sorted(wrong)[:10])
        more = f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise DataError(f"{path}: {len(wrong)} records cannot be read\n{told}{more}")
    return [record for _, record in table.records]


def chosen(names: Sequence[str] | None, known: Iterable[str], kind: str) -> list[str]:
    """Return the names asked for, or all that are known.

    Raises:
        DataError: one is not known.
    """
    every = list(dict.fromkeys(known))
    for name in names or ():
        if name not in every:
            raise DataError(f"there is no {kind} named {name!r}{suggest(name, every)} (known: {', '.join(every)})")
    return every if names is None else list(names)


def drawn(evaluator: str, total: int, limit: int | None, split: Split, seed: int) -> list[int]:
    """Return which of `total` items are asked, in ascending order.

    Those that judge a run in its course are none of those that judge its end.

    Args:
        limit: items; None: all.

    Raises:
        DataError: `validation` items are asked for and none is left beside those of the end.
    """
    order = seeds.numpy_generator(seed, None, None, evaluator).permutation(total).tolist()
    size = total if limit is None else limit
    some: list[int] = order[:size] if split == "test" else order[size : 2 * size]
    if not some:
        raise DataError(
            f"evaluator {evaluator}: all {total} items are kept for the end, so none is left for the course of the "
            f"run; set limit to at most {total // 2}, or every: 0"
        )
    return sorted(some)


def over_adapters(
    view: View, score: Callable[[Using], Scored], settings: Mapping[str, Any] | None = None
) -> Evaluation:
    """Measure each adapter of a regime; the metrics are means over them.

    Args:
        score: an adapter -> its metrics and samples.
    """
    clients: dict[str | None, dict[str, float]] = {}
    samples: list[tuple[str | None, Sample]] = []
    for client, adapter in view.adapters.items():
        clients[client], mine = score(adapter)
        samples += [(client, one) for one in mine]
    names = next(iter(clients.values())).keys()
    mean = {name: float(np.mean([one[name] for one in clients.values()])) for name in names}
    return Evaluation(mean, {c: m for c, m in clients.items() if c is not None}, samples, settings=settings or {})
