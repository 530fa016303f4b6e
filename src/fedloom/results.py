"""Results for people: regimes by metrics, how sure the figures are, what a run cost, and what to do next."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedloom.evaluate import Evaluator, scored
from fedloom.evaluate.scored import Answered
from fedloom.evaluate.view import ADAPTED
from fedloom.units import human_bytes, human_seconds

REGIMES = tuple(
    name
    for regime in ("base", "local", "federated", "centralized", "personal", "unseen")
    for name in (regime, f"{regime}{ADAPTED}")
)
"""In the order in which they are shown."""
MAIN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "loss": ("loss", "perplexity", "bits_per_byte"),
        "tasks": ("exact_match", "contained"),
        "gsm8k": ("numeric", "flexible", "strict"),
    }
)
"""The metrics worth a column, the most telling first; of other evaluators the first three."""
COLUMNS = 6
"""As many fit a terminal of 80 columns; summary.json has all metrics."""
SHARES = (
    *("exact_match", "contained", "numeric", "flexible", "strict", "pass@1", "pass@10", "pass@100"),
    *("accuracy", "accuracy_macro", "macro_f1", "mc1", "mc2"),
)

Metrics = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Regime -> evaluator -> metric -> value, or None where it is not finite, as in summary.json."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One metric of one evaluator.

    Attributes:
        higher: whether higher is better; None: not known.
    """

    evaluator: str
    metric: str
    higher: bool | None

    @property
    def title(self) -> str:
        """Heading of its column."""
        name = self.metric.replace("_", " ")
        return name if self.evaluator in MAIN else f"{self.evaluator} {name}"

    def text(self, value: float | None) -> str:
        """Return the value for people."""
        if value is None:
            return "-"
        return f"{100 * value:.1f} %" if self.metric in SHARES else f"{value:.4g}"

    def best(self, values: list[float]) -> float | None:
        """Return the best of several values, or None where they do not differ or the direction is not known."""
        if self.higher is None or len(set(values)) < 2:
            return None
        return max(values) if self.higher else min(values)


def primary(evaluator: str) -> str:
    """Return an evaluator's primary metric, of which its samples' scores are the parts."""
    known = Evaluator.known.get(evaluator)
    return known.primary if known is not None and issubclass(known, Evaluator) else "score"


def measures(evaluator: str, metrics: Mapping[str, Any]) -> list[Measure]:
    """Return the main metrics of an evaluator among those it found."""
    known = Evaluator.known.get(evaluator)
    higher = known.higher_is_better if known is not None and issubclass(known, Evaluator) else None
    first = [name for name in (primary(evaluator),) if name in metrics]
    plain = list(dict.fromkeys([*first, *(n for n in metrics if not n.endswith(("_worst10", "_variance")))]))
    chosen = [name for name in MAIN.get(evaluator, plain[:3]) if name in metrics]
    return [Measure(evaluator, name, higher) for name in chosen]


def results(metrics: Metrics) -> Table:
    """Return a table of regimes by main metrics, the best value of each column in bold."""
    regimes = _ordered(metrics)
    table = Table(title="results on held-out data", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("regime", style="cyan", no_wrap=True)
    evaluators = dict.fromkeys(e for r in regimes for e in metrics[r])
    each, columns = max(1, COLUMNS // max(1, len(evaluators))), []
    for one in dict.fromkeys(m for r in regimes for e, found in metrics[r].items() for m in measures(e, found)[:each]):
        values = {r: metrics[r].get(one.evaluator, {}).get(one.metric) for r in regimes}
        best = one.best([value for value in values.values() if value is not None])
        columns.append(
            {r: Text(one.text(v), "bold green" if v is not None and v == best else "") for r, v in values.items()}
        )
        table.add_column(one.title, justify="right")
    for regime in regimes:
        table.add_row(regime, *(cells[regime] for cells in columns))
    return table


def intervals(folder: Path) -> list[str]:
    """Return a line for each evaluator of a run folder that kept samples: its primary metric's 95 % intervals.

    Each says how it was found. Personal adapters are left out, and what has no interval (`scored.estimate`).
    """
    answers: dict[str, dict[str, list[Answered]]] = {}
    for path in [*sorted(folder.glob("samples/*.jsonl")), *sorted(folder.glob("regimes/*/samples/*.jsonl"))]:
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if line["client"] is None and line["score"] is not None:
                one = Answered(line["id"], line["score"], line.get("stratum", ""))
                answers.setdefault(path.stem, {}).setdefault(line["regime"], []).append(one)
    return [line for evaluator, regimes in answers.items() for line in _intervals(evaluator, regimes)]


def _intervals(evaluator: str, regimes: Mapping[str, Sequence[Answered]]) -> list[str]:
    """Return a line for each method by which a regime's interval was found."""
    measure = Measure(evaluator, primary(evaluator), None)
    told: dict[str, list[str]] = {}
    count = 0
    for regime in _ordered(regimes):
        items = scored.items(regimes[regime])
        if (found := scored.estimate(items)) is not None:
            low, high = (measure.text(end) for end in (found.interval.low, found.interval.high))
            told.setdefault(found.method, []).append(f"{regime} {low.removesuffix(' %')} to {high}")
            count = max(count, len(items))
    what = f"{evaluator} {measure.metric.replace('_', ' ')}: {count} items"
    return [f"{what}, 95 % intervals ({method}): {', '.join(found)}" for method, found in told.items()]


def not_run(reasons: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return a line for each evaluator and reason in summary.json's `not_run`, with its regimes."""
    regimes: dict[tuple[str, str], list[str]] = {}
    for regime in _ordered(reasons):
        for evaluator, why in reasons[regime].items():
            regimes.setdefault((evaluator, why), []).append(regime)
    return [f"not run: {evaluator} ({', '.join(where)}): {why}" for (evaluator, why), where in regimes.items()]


def _ordered(regimes: Iterable[str]) -> list[str]:
    """Return the regimes in the usual order, unusual ones last."""
    names = list(regimes)
    return sorted(names, key=[*REGIMES, *names].index)


def report(console: Console, folder: Path, summary: Mapping[str, Any]) -> None:
    """Print the result of a run: the table, what it cost, where it is, and what to do next."""
    console.print(results(summary["metrics"]))
    for line in intervals(folder):
        console.print(Text(line, "dim"))
    for line in not_run(summary.get("not_run", {})):
        console.print(Text(line, "yellow"))
    console.print(
        Text(
            f"trained on {summary['trained_tokens']:,} tokens at {summary['tokens_per_second']:,.0f} tokens/s in "
            f"{human_seconds(summary['wall_seconds'])}, {human_bytes(summary['bytes_down'])} down, "
            f"{human_bytes(summary['bytes_up'])} up; {human_bytes(summary['peak_rss_bytes'])} of memory at most"
        )
    )
    where = Text.assemble("run folder ", (str(folder), "bold"), f", adapter {summary['adapter_sha256'][:12]}")
    commands = (f"chat {folder}", f"eval {folder}", f"export {folder} --to merged", f"run --resume {folder} rounds=+10")
    # not wrapped, so that paths and commands can be copied
    console.print(Text("\n").join([where, Text("next:"), *(Text(f"  fedloom {c}") for c in commands)]), soft_wrap=True)
