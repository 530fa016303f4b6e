"""The tables of a bench: scores over seeds, costs, and which differences are more than chance.

A row is a recipe, a variation and a regime. Scores are the mean and the standard deviation over seeds. The comparisons
below are those of `comparisons`.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from fedloom.bench.comparisons import Comparison, comparisons
from fedloom.bench.grid import Outcome
from fedloom.cost import UNITS, beside
from fedloom.evaluate.view import ADAPTED
from fedloom.results import REGIMES, measures
from fedloom.units import human_bytes

COMPARED = (
    "evaluator",
    "first",
    "second",
    "second - first",
    "95 % interval",
    "mean ± sd over seeds",
    "p at each seed (McNemar, Holm)",
    "items",
    "seeds",
)
"""Heads of the tables of comparisons for people, after that of what both sides have in common."""
COSTS = {
    "bytes": "bytes up and down",
    "tokens": "trained tokens",
    "seconds": "seconds of training",
    "memory": "peak memory",
    "flops": "FLOPs of training",
    "beside_flops": "FLOPs beside training",
    "beside_seconds": "seconds beside training",
}
"""What a regime's own training took. Beside training: gradients, scores, embeddings and generated texts that the method
asked for. Evaluation is in none of them."""
TEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "–": "--",
        **{mark: f"\\{mark}" for mark in "_%&#{}$"},
    }
)


@dataclass(frozen=True, slots=True)
class Row:
    """One variation in one regime.

    Attributes:
        seeds: how many runs.  scores: metric -> values, one a seed.  costs: name of `COSTS` -> mean over seeds.
    """

    recipe: str
    variation: str
    regime: str
    seeds: int
    scores: Mapping[str, Sequence[float]]
    costs: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Bench:
    """All of a bench's tables.

    Attributes:
        missing: (recipe, variation, seed, why) of cells without a result.
        unpaired: what could not be compared, and why.
    """

    rows: Sequence[Row]
    comparisons: Sequence[Comparison]
    missing: Sequence[tuple[str, str, int, str]]
    unpaired: Sequence[str] = ()

    def metrics(self) -> list[str]:
        """Return the metrics that any row has, in order."""
        return list(dict.fromkeys(name for row in self.rows for name in row.scores))

    def heads(self) -> list[str]:
        """Return the heads of the table for people."""
        return ["recipe", "variation", "regime", "seeds", *self.metrics(), *(COSTS[key] for key in self._costs())]

    def cells(self) -> list[list[str]]:
        """Return the table for people: mean and standard deviation."""
        return [
            [row.recipe, row.variation, row.regime, str(row.seeds)]
            + [_spread(row.scores.get(name, ())) for name in self.metrics()]
            + [_cost(key, row.costs.get(key)) for key in self._costs()]
            for row in self.rows
        ]

    def groups(self) -> list[tuple[str, list[list[str]]]]:
        """Return the comparisons for people: kind of comparison, and its lines under `COMPARED`."""
        kinds = groupby(self.comparisons, key=lambda one: one.group)
        return [(kind, [_compared(one) for one in found]) for kind, found in kinds]

    def notes(self) -> list[str]:
        """Return what could not be compared, and the cells without a result, a sentence each."""
        lines = [f"not paired: {why}" for why in self.unpaired]
        return lines + [f"{recipe}, {variation}, seed {seed}: {why}" for recipe, variation, seed, why in self.missing]

    def write(self, folder: Path) -> list[Path]:
        """Write table.json, .csv, .md and .tex, and comparisons.csv; return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        texts = {
            "table.json": json.dumps(asdict(self), indent=1) + "\n",
            "table.csv": self._csv(),
            "comparisons.csv": self._comparisons_csv(),
            "table.md": self.markdown(),
            "table.tex": self.latex(),
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        return [folder / name for name in texts]

    def markdown(self) -> str:
        """Return the tables as Markdown."""
        lines = [_line(self.heads()), _line(["---"] * len(self.heads())), *map(_line, self.cells())]
        for kind, found in self.groups():
            heads = ["of", *COMPARED]
            lines += ["", f"{kind}:", "", _line(heads), _line(["---"] * len(heads)), *map(_line, found)]
        notes = [f"- {' '.join(note.split())}" for note in self.notes()]
        return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"

    def latex(self) -> str:
        """Return the tables as LaTeX (tabulars with booktabs rules); what is missing stands in comments."""
        texts = [_tabular("l" * 3, self.heads(), self.cells())]
        texts += [f"% {kind}\n" + _tabular("l" * 4, ["of", *COMPARED], found) for kind, found in self.groups()]
        notes = "".join(f"% {' '.join(note.split())}\n" for note in self.notes())
        return "\n".join([*texts, *([notes] if notes else [])])

    def _csv(self) -> str:
        names = self.metrics()
        moments = [f"{n}_{kind}" for n in names for kind in ("mean", "sd")]
        lines: list[Sequence[object]] = [["recipe", "variation", "regime", "seeds", *moments, *COSTS]]
        for row in self.rows:
            spread = [value for name in names for value in _moments(row.scores.get(name, ()))]
            costs = [row.costs.get(key, "") for key in COSTS]
            lines.append([row.recipe, row.variation, row.regime, row.seeds, *spread, *costs])
        return _csv(lines)

    def _comparisons_csv(self) -> str:
        """Return a line for each comparison and seed, after one of all seeds, which has the interval."""
        names = ("group", "where", "evaluator", "first", "second")
        lines: list[Sequence[object]] = [[*names, "seed", "difference", "low", "high", "sd", "p_holm", "items"]]
        for one in self.comparisons:
            what = [getattr(one, name) for name in names]
            sd = one.spread[1]
            lines.append([*what, "all", one.difference, one.low, one.high, "" if sd is None else sd, "", one.items])
            for at in one.seeds:
                lines.append([*what, at.seed, at.difference, "", "", "", "" if at.p is None else at.p, at.items])
        return _csv(lines)

    def _costs(self) -> list[str]:
        return [key for key in COSTS if any(key in row.costs for row in self.rows)]


def tabulate(outcomes: Iterable[Outcome]) -> Bench:
    """Return the tables of what became of a bench's cells."""
    outcomes = list(outcomes)
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for one in outcomes:
        if one.summary:
            groups.setdefault((one.cell.name, one.cell.label), []).append(one)
    rows = [
        _row(recipe, label, regime, found) for (recipe, label), found in groups.items() for regime in _regimes(found)
    ]
    missing = [(o.cell.name, o.cell.label, o.cell.seed, o.reason) for o in outcomes if not o.summary]
    compared, unpaired = comparisons(outcomes)
    return Bench(rows, compared, missing, unpaired)


def _regimes(found: Sequence[Outcome]) -> list[str]:
    names = list(dict.fromkeys(name for one in found for name in one.summary["metrics"]))
    return sorted(names, key=[*REGIMES, *names].index)


def _row(recipe: str, label: str, regime: str, found: Sequence[Outcome]) -> Row:
    scores: dict[str, list[float]] = {}
    for one in found:
        for evaluator, metrics in one.summary["metrics"].get(regime, {}).items():
            for measure in measures(evaluator, metrics)[:2]:
                for name in (measure.metric, f"{measure.metric}_worst10", f"{measure.metric}_variance"):
                    value = metrics.get(name)
                    if value is not None and (name == measure.metric or measure == measures(evaluator, metrics)[0]):
                        scores.setdefault(f"{evaluator} {name}", []).append(value)
    told = [cost for one in found if (cost := _costs_of(one, regime))]
    known = [key for key in COSTS if told and all(key in one for one in told)]
    costs = {key: statistics.fmean(one[key] for one in told) for key in known}
    return Row(recipe, label, regime, len(found), scores, costs)


def _costs_of(outcome: Outcome, regime: str) -> dict[str, float]:
    """Return the costs of a regime's own training; the base has none."""
    summary = outcome.summary
    own = outcome.cell.folder / "regimes" / regime / "summary.json"
    if own.is_file():
        summary = json.loads(own.read_text(encoding="utf-8"))
    elif regime in ("base", "unseen") or regime.endswith(ADAPTED):
        return {}
    found = {
        "bytes": summary["bytes_up"] + summary["bytes_down"],
        "tokens": summary["trained_tokens"],
        "seconds": summary["fit_seconds"],
        "memory": summary["peak_rss_bytes"],
    }
    later = {"flops": summary.get("flops"), **{f"beside_{unit}": beside(summary, unit) for unit in UNITS}}
    return {**found, **{key: value for key, value in later.items() if value is not None}}


def _moments(values: Sequence[float]) -> tuple[float | str, float | str]:
    if not values:
        return "", ""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else ""


def _spread(values: Sequence[float]) -> str:
    mean, sd = _moments(values)
    if isinstance(mean, str):
        return ""
    return f"{mean:.4g}" if isinstance(sd, str) else f"{mean:.4g} ± {sd:.2g}"


def _cost(key: str, value: float | None) -> str:
    if value is None:
        return ""
    if key in ("bytes", "memory"):
        return human_bytes(int(value))
    return f"{value:.3g}" if key.endswith("flops") else f"{value:,.0f}"


def _compared(one: Comparison) -> list[str]:
    mean, sd = one.spread
    over = f"{mean:+.4g}" if sd is None else f"{mean:+.4g} ± {sd:.2g}"
    known = any(at.p is not None for at in one.seeds)
    p = ", ".join("–" if at.p is None else f"{at.p:.3g}" for at in one.seeds) if known else "–"
    span = f"{one.low:+.4g} to {one.high:+.4g}"
    count = [str(one.items), str(len(one.seeds))]
    return [one.where, one.evaluator, one.first, one.second, f"{one.difference:+.4g}", span, over, p, *count]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _csv(lines: Iterable[Sequence[object]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()


def _tabular(left: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a tabular whose first columns stand as `left` says and the others on the right."""
    lines = [" & ".join(cell.translate(TEX) for cell in cells) + r" \\" for cells in (heads, *rows)]
    columns = left + "r" * (len(heads) - len(left))
    body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *body])
