"""What a report is drawn from: the files of a run folder, finished or not."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from fedloom.evaluate.view import ADAPTED
from fedloom.outcome import read_object, read_summary
from fedloom.results import REGIMES, Metrics
from fedloom.types import RecipeError

Curve: TypeAlias = dict[int, float]
"""Round -> value; values that are not finite are left out."""
SPLITS = ("train", "validation", "test")


@dataclass(slots=True)
class Run:
    """One run folder.

    Attributes:
        summary: content of summary.json; empty for a run that has not come to its end.
        rounds: name -> its curve over the whole cohort, such as train_loss, bytes_up.
        losses: client -> training loss by round.
        validation: (regime, evaluator, metric) -> its curve.
        tested: (regime, evaluator, metric) -> client -> value on test data.
        metrics: regime -> evaluator -> metric -> value on test data, those of compared regimes included.
        samples: evaluator -> lines of its file, compared regimes included.
        sizes: client -> rows of train, validation, test.  tests: client -> hash of its test rows' ids.
        composition: content of composition.json, or empty.
        others: compared regime -> its own run.
    """

    folder: Path
    recipe: Mapping[str, Any]
    summary: Mapping[str, Any] = field(default_factory=dict)
    rounds: dict[str, Curve] = field(default_factory=dict)
    losses: dict[str, Curve] = field(default_factory=dict)
    validation: dict[tuple[str, str, str], Curve] = field(default_factory=dict)
    tested: dict[tuple[str, str, str], dict[str, float]] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)
    samples: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    sizes: dict[str, Sequence[int]] = field(default_factory=dict)
    tests: dict[str, str] = field(default_factory=dict)
    composition: Mapping[str, Any] = field(default_factory=dict)
    others: dict[str, Run] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.summary)

    @property
    def done(self) -> int:
        """Rounds that were finished."""
        return max(self.rounds.get("train_loss", {0: 0.0}), default=0)

    @property
    def own(self) -> str:
        """The regime that the run itself trained; before its end, what its recipe is expected to measure."""
        beside = ("base", "unseen", *self.others)
        names = [n for n in self.metrics if n not in beside and not n.endswith(ADAPTED)]
        names += [regime for regime, _, _ in self.validation]
        return names[0] if names else "federated"

    @property
    def regimes(self) -> dict[str, Run]:
        """The trained regimes, the run's own first."""
        return {self.own: self, **self.others}


def read(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        RecipeError: it is no run folder, or one of its files is damaged.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise RecipeError(f"{folder} holds no recipe.yaml, so it is no run folder; name a folder that fedloom run made")
    run = Run(folder, yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    run.summary = read_summary(folder)
    found: dict[str, Mapping[str, Mapping[str, Any]]] = _metrics(run, folder / "metrics.jsonl")
    _split(run)
    for place in sorted(folder.glob("regimes/*/recipe.yaml")):
        run.others[place.parent.name] = read(place.parent)
    run.others = {name: run.others[name] for name in ordered(run.others)}
    for other in run.others.values():
        found |= {regime: metrics for regime, metrics in other.metrics.items() if regime not in found}
    run.metrics = run.summary.get("metrics") or found
    for source in (run, *run.others.values()):
        for file in sorted(source.folder.glob("samples/*.jsonl")):
            run.samples.setdefault(file.stem, []).extend(_lines(file))
    return run


def ordered(regimes: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Return regimes in the usual order, unusual ones last."""
    names = list(regimes)
    return sorted(names, key=[*REGIMES, *names].index)


def _lines(path: Path) -> Iterator[Any]:
    """Yield the objects of a jsonl file up to a line that a kill has torn."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                return


def _metrics(run: Run, path: Path) -> dict[str, Mapping[str, Mapping[str, Any]]]:
    """Sort the lines of metrics.jsonl into curves; return those on test data."""
    tested: dict[str, dict[str, dict[str, float]]] = {}
    for line in _lines(path):
        client, name, round_, value = line["client"], line["name"], line["round"], line["value"]
        if value is None or not math.isfinite(value):
            continue
        where, *rest = name.split("/", 3)
        if len(rest) < 3:
            if client is None:
                run.rounds.setdefault(name, {})[round_] = value
            elif name == "loss":
                run.losses.setdefault(client, {})[round_] = value
            continue
        key = (rest[0], rest[1], rest[2])
        if where == "validation" and client is None:
            run.validation.setdefault(key, {})[round_] = value
        elif where == "test" and client is None:
            tested.setdefault(key[0], {}).setdefault(key[1], {})[key[2]] = value
        elif where == "test":
            run.tested.setdefault(key, {})[client] = value
    run.metrics = tested
    return dict(tested)


def _split(run: Run) -> None:
    for client, parts in read_object(run.folder / "split.json").items():
        if isinstance(parts, Mapping):
            run.sizes[client] = tuple(len(parts.get(name, ())) for name in SPLITS)
            run.tests[client] = hashlib.sha256(json.dumps(parts.get("test", ())).encode()).hexdigest()
    run.composition = read_object(run.folder / "composition.json")
