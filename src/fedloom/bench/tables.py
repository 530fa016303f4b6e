"""The tables of a bench: scores over seeds, costs, and which differences are more than chance.

A row is a recipe, a variation and a regime. Scores are the mean and the standard deviation over seeds. Two variations
are compared on the very same items of the very same seeds: the difference with its paired bootstrap interval (items
resampled within their seed), and McNemar's exact test where items are right or wrong, adjusted for their number (Holm).
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedloom.bench.grid import Outcome
from fedloom.cost import UNITS, beside
from fedloom.evaluate import stats
from fedloom.evaluate.view import ADAPTED
from fedloom.results import REGIMES, measures
from fedloom.units import human_bytes

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
class Comparison:
    """How the second of two rows differs from the first on one evaluator.

    Attributes:
        difference, low, high: of the mean score, second minus first, with its 95 % interval.
        p: of McNemar's test, adjusted; None: scores are graded.  items: pairs.
    """

    recipe: str
    evaluator: str
    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float | None
    items: int


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

    def write(self, folder: Path) -> list[Path]:
        """Write table.json, table.csv, table.md and table.tex, and return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        texts = {
            "json": json.dumps(asdict(self), indent=1) + "\n",
            "csv": self._csv(),
            "md": self.markdown(),
            "tex": self.latex(),
        }
        for end, text in texts.items():
            (folder / f"table.{end}").write_text(text, encoding="utf-8")
        return [folder / f"table.{end}" for end in texts]

    def markdown(self) -> str:
        """Return the tables as Markdown."""
        lines = [_line(self.heads()), _line(["---"] * len(self.heads())), *map(_line, self.cells())]
        if self.comparisons:
            heads = ["recipe", "evaluator", "first", "second", "second - first", "95 % interval", "p (Holm)", "items"]
            lines += ["", _line(heads), _line(["---"] * len(heads)), *(_line(_told(one)) for one in self.comparisons)]
        lines += [""] if self.missing or self.unpaired else []
        lines += [f"- not paired: {why}" for why in self.unpaired]
        lines += [f"- {recipe}, {variation}, seed {seed}: {why}" for recipe, variation, seed, why in self.missing]
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        """Return the first table as LaTeX (a tabular with booktabs rules)."""
        rows = [" & ".join(map(_tex, cells)) + r" \\" for cells in self.cells()]
        heads = " & ".join(map(_tex, self.heads())) + r" \\"
        columns = "l" * 3 + "r" * (len(self.heads()) - 3)
        return "\n".join(
            [
                rf"\begin{{tabular}}{{{columns}}}",
                r"\toprule",
                heads,
                r"\midrule",
                *rows,
                r"\bottomrule",
                r"\end{tabular}",
                "",
            ]
        )

    def _csv(self) -> str:
        out = io.StringIO()
        names = self.metrics()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(
            [
                "recipe",
                "variation",
                "regime",
                "seeds",
                *(f"{n}_{kind}" for n in names for kind in ("mean", "sd")),
                *COSTS,
            ]
        )
        for row in self.rows:
            spread = [value for name in names for value in _moments(row.scores.get(name, ()))]
            writer.writerow(
                [row.recipe, row.variation, row.regime, row.seeds, *spread, *(row.costs.get(key, "") for key in COSTS)]
            )
        return out.getvalue()

    def _costs(self) -> list[str]:
        return [key for key in COSTS if any(key in row.costs for row in self.rows)]


def tabulate(outcomes: Iterable[Outcome]) -> Bench:
    """Return the tables of what became of a bench's cells."""
    outcomes = list(outcomes)
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for one in outcomes:
        if one.summary:
            groups.setdefault((one.cell.recipe, one.cell.label), []).append(one)
    rows = [
        _row(recipe, label, regime, found) for (recipe, label), found in groups.items() for regime in _regimes(found)
    ]
    missing = [(o.cell.recipe, o.cell.label, o.cell.seed, o.reason) for o in outcomes if not o.summary]
    comparisons, unpaired = _comparisons(groups)
    return Bench(rows, comparisons, missing, unpaired)


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


def _comparisons(groups: Mapping[tuple[str, str], Sequence[Outcome]]) -> tuple[list[Comparison], list[str]]:
    """Compare every variation with the first of its recipe, in the recipe's own regime; tell what could not be."""
    found, unpaired = list[Comparison](), list[str]()
    firsts: dict[str, tuple[str, Sequence[Outcome]]] = {}
    for (recipe, label), outcomes in groups.items():
        if recipe not in firsts:
            firsts[recipe] = label, outcomes
            continue
        first, others = firsts[recipe]
        a, b = _samples(others), _samples(outcomes)
        for evaluator in a.keys() & b.keys():
            items = sorted(a[evaluator].keys() & b[evaluator].keys())
            if odd := _settings_apart(evaluator, [*others, *outcomes]):
                unpaired.append(f"{recipe}, {evaluator}: {first} and {label} differ in {', '.join(odd)}")
            elif items:
                found.append(_compare((recipe, evaluator, first, label), items, a[evaluator], b[evaluator]))
    adjusted = iter(stats.holm([one.p for one in found if one.p is not None]))
    told = [one if one.p is None else Comparison(**{**asdict(one), "p": next(adjusted)}) for one in found]
    return told, unpaired


def _settings_apart(evaluator: str, outcomes: Sequence[Outcome]) -> list[str]:
    """Return the settings of an evaluator, such as dtype or batch, in which runs differ: they measured other things."""
    told = [one.summary.get("evaluation", {}).get(evaluator, {}) for one in outcomes]
    return sorted({key for one in told for key in one.keys() | told[0].keys() if one.get(key) != told[0].get(key)})


Items = dict[tuple[int, str | None, str], float]
"""(seed, client, item) -> score."""


def _compare(names: tuple[str, str, str, str], items: Sequence[Any], a: Items, b: Items) -> Comparison:
    first, second = [a[item] for item in items], [b[item] for item in items]
    gap = stats.paired_bootstrap(second, first, [item[0] for item in items])
    graded = any(score not in (0, 1) for score in (*first, *second))
    p = None if graded else stats.mcnemar(first, second)
    recipe, evaluator, one, other = names
    return Comparison(recipe, evaluator, one, other, gap.mean, gap.low, gap.high, p, len(items))


def _samples(outcomes: Sequence[Outcome]) -> dict[str, Items]:
    """Return evaluator -> the scored items of the runs' own regime."""
    found: dict[str, Items] = {}
    for one in outcomes:
        own = next(name for name in one.summary["metrics"] if name != "base")
        for path in sorted(one.cell.folder.glob("samples/*.jsonl")):
            for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
                if line["regime"] == own and line["score"] is not None:
                    found.setdefault(path.stem, {})[one.cell.seed, line["client"] or "", line["id"]] = line["score"]
    return found


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


def _told(one: Comparison) -> list[str]:
    p = "" if one.p is None else f"{one.p:.3g}"
    span = f"{one.low:+.4g} to {one.high:+.4g}"
    return [one.recipe, one.evaluator, one.first, one.second, f"{one.difference:+.4g}", span, p, str(one.items)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _tex(text: str) -> str:
    for plain, escaped in (
        ("\\", r"\textbackslash{}"),
        ("_", r"\_"),
        ("%", r"\%"),
        ("&", r"\&"),
        ("#", r"\#"),
        ("±", r"$\pm$"),
    ):
        text = text.replace(plain, escaped)
    return text
