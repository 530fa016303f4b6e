"""Where a run reports to: `metrics.jsonl` always, and further trackers as parts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from fedloom.parts import Part


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is going to do, known before the first round.

    Attributes:
        lines: (label, text) pairs for people.
        rounds: number of rounds.  start: the round it begins with.
        clients: number of clients that may take part.
        tokens: expected trained tokens of the whole run.
    """

    name: str
    regime: str
    folder: Path
    lines: Sequence[tuple[str, str]]
    rounds: int
    start: int
    clients: int
    tokens: int


@dataclass(frozen=True, slots=True)
class RoundReport:
    """What one round did.

    Attributes:
        round: finished rounds, this one included.  rounds: of the whole run.
        loss: token-weighted training loss over the cohort.
        clients: client -> metrics.  rejected: clients whose update was not finite.
        tokens: trained tokens.  examples: trained rows.  bytes_down, bytes_up: as encoded.
        seconds: of the round.  fit_seconds: of these, spent in local training.
        aggregation_error: see `runtime.aggregation`; None: the method has no product to compare.
        flops: operations of all training, see `cost`.
        beside: `<phase>_flops` and `<phase>_seconds` of what else clients did, where they did.
    """

    round: int
    rounds: int
    loss: float
    clients: Mapping[str, Mapping[str, float]]
    rejected: Sequence[str]
    tokens: int
    examples: int
    bytes_down: int
    bytes_up: int
    seconds: float
    fit_seconds: float
    aggregation_error: float | None = None
    flops: float = 0.0
    beside: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Phase:
    """Something that takes a while has begun or moved on.

    Attributes:
        text: what it is; "" ends it.  done, total: how far it is; total 0: of unknown length.
    """

    text: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class Cohort:
    """Round `round` (from 0) begins with these clients."""

    round: int
    clients: Sequence[str]


@dataclass(frozen=True, slots=True)
class Step:
    """A client took one optimiser step; `loss` is its mean loss in nats per trained token."""

    client: str
    tokens: int
    loss: float


@dataclass(frozen=True, slots=True)
class Trained:
    """A client's round is over."""

    client: str
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An evaluator has measured a regime after `round` finished rounds; `final`: on test data, at the end."""

    regime: str
    round: int
    evaluator: str
    metrics: Mapping[str, float]
    final: bool


@dataclass(frozen=True, slots=True)
class Warned:
    """Something that a person should know and that stops nothing."""

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The whole run, with all its regimes, is over; `summary` is the content of summary.json."""

    summary: Mapping[str, Any]


Event: TypeAlias = Plan | Phase | Cohort | Step | Trained | RoundReport | Evaluated | Warned | Finished


class Sink(AbstractContextManager["Sink"]):
    """Receives the events of a run in order."""

    def on(self, event: Event) -> None:
        """Take note of one event, or ignore it."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close files and displays."""


class Sinks(Sink):
    """Several sinks as one."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = tuple(sinks)

    def on(self, event: Event) -> None:
        for sink in self.sinks:
            sink.on(event)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in reversed(self.sinks):
            sink.__exit__(kind, error, trace)


class Tracker(Part, family=True):
    """A further place to report to."""

    def open(self, name: str, folder: Path, recipe: Mapping[str, Any]) -> Sink:
        """Return the sink of one run.

        Args:
            name: the run's name.  folder: its run folder.  recipe: the resolved recipe.

        Raises:
            RecipeError: what it needs is not installed.
        """
        raise NotImplementedError


@dataclass(slots=True)
class MetricsFile:
    """`metrics.jsonl`: one object a line, `round`, `client`, `name`, `value`, `time` (seconds since the epoch)."""

    path: Path
    _lines: list[str] = field(default_factory=list)

    def add(self, round_: int, client: str | None, metrics: Mapping[str, float]) -> None:
        """Keep one line a metric until `flush`."""
        now = round(time.time(), 3)
        for name, value in metrics.items():
            line = {"round": round_, "client": client, "name": name, "value": value, "time": now}
            self._lines.append(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Append the kept lines to the file."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(self._lines)
        self._lines.clear()

    def restore(self, round_: int, finished: bool = False) -> None:
        """Drop the lines of rounds after `round_`, those of the final evaluation, and a torn last line.

        Args:
            finished: the lines of what clients did after the last round stay.
        """
        gone = ("test/",) if finished else ("test/", "finish/")
        keep_lines(
            self.path,
            lambda line: line["round"] <= round_ and (line["round"] == 0 or not any(n in line["name"] for n in gone)),
        )


def keep_lines(path: Path, keep: Callable[[Any], bool]) -> None:
    """Rewrite a jsonl file with those of its lines that `keep` wants; a line torn by a kill ends the file."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if keep(json.loads(line)):
                kept.append(line + "\n")
        except ValueError:
            break
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
