"""Several runs on one page: curves over each other, scores and costs side by side, and tests on the same items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from markupsafe import Markup

from fedloom.evaluate.stats import holm
from fedloom.report import compare, parts, svg
from fedloom.report.parts import Section, figure, grid, paragraph, table
from fedloom.report.read import Run
from fedloom.report.results import dot_of, primary
from fedloom.report.sides import evaluators, side, why_not
from fedloom.report.training import against_bytes, chart, cost_row


def named(runs: Sequence[Run]) -> dict[str, Run]:
    """Return the runs by the shortest end of their paths that tells all apart."""
    paths = [run.folder.resolve().parts for run in runs]
    for size in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-size:]) for path in paths]
        if len(set(names)) == len(names):
            return dict(zip(names, runs, strict=True))
    return {f"{i + 1} {run.name}": run for i, run in enumerate(runs)}  # one folder twice


def sections(runs: Mapping[str, Run]) -> tuple[list[Section], list[str]]:
    """Return the page's sections, and why results were not paired."""
    tests, refused = _tests(runs)
    return [_scores(runs), tests, curves(runs), _costs(runs), settings(runs)], refused


def _evaluators(runs: Mapping[str, Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs.values() for name in run.metrics.get(run.own, {})))


def _scores(runs: Mapping[str, Run]) -> Section:
    figures, rows, heads = [], [[name, run.own] for name, run in runs.items()], ["run", "regime"]
    for evaluator in _evaluators(runs):
        metrics = {m for run in runs.values() if (m := primary(evaluator, run)) is not None}
        for metric in sorted(metrics):
            values = [run.metrics.get(run.own, {}).get(evaluator, {}).get(metric) for run in runs.values()]
            text, title = parts.text_of(metric), parts.title_of(evaluator, metric)
            heads.append(title)
            for row, value in zip(rows, values, strict=True):
                row.append("–" if value is None else text(value))
            drawn = [
                (name, parts.tone(name, i), dot_of(run, evaluator, metric, run.own))
                for i, (name, run) in enumerate(runs.items())
                if values[i] is not None
            ]
            dots = [replace(dot, name=name, tone=tone) for name, tone, (dot, _) in drawn]
            if dots:
                behind = table(["run", title], [[dot.name, text(dot.value)] for dot in dots])
                better = parts.direction(evaluator, metric).capitalize()
                notes = dict.fromkeys(note for _, _, (_, note) in drawn if note)
                note = ". ".join([better, *notes]) + "."
                figures.append(figure(title, svg.dots(title, dots, metric.replace("_", " "), text), behind, note))
    body = grid(figures) + table(heads, rows, "Each run's own regime, on its test data")
    return Section("scores", "Scores", body)


def _tests(runs: Mapping[str, Run]) -> tuple[Section, list[str]]:
    """Compare every run with the first one where both answered the same items under the same settings."""
    (first, base), *others = [(name, side(run, run.own)) for name, run in runs.items()]
    rows: list[list[object]] = []
    refused: list[str] = []
    for evaluator in evaluators(base, *(one for _, one in others)):
        found: list[tuple[str, compare.Paired]] = []
        for name, other in others:
            if why := why_not(base, other, evaluator, (first, name)):
                refused.append(f"{evaluator}: {name} was not paired with {first}: {why}")
            else:
                found.append((name, compare.pair(base.items[evaluator], other.items[evaluator])))
        adjusted = iter(holm([one.p for _, one in found if one.p is not None]))
        metric = primary(evaluator, runs[first]) or ""
        rows += [_row(evaluator, metric, name, one, None if one.p is None else next(adjusted)) for name, one in found]
    body = paragraph(
        f"Each run against {first}, item by item, or client by client where an evaluator keeps no samples (loss): a "
        "paired bootstrap for the size of the difference, McNemar's exact "
        "test for right and wrong (p adjusted by Holm for the number of runs). They tell of these test items; how much "
        "another training seed would change is told only by runs of several seeds.",
        "note",
    )
    heads = ["evaluator, run", "items", first, "this run", "difference", "95 % interval", "higher", "lower", "p"]
    if rows:
        body += table(heads, rows, f"Against {first}")
    elif not refused:
        body += paragraph("These runs keep no samples that could be paired.")
    body += Markup("").join(paragraph(f"Not paired. {one}", "warning") for one in refused)
    return Section("tests", "Differences on the same items", body), refused


def _row(evaluator: str, metric: str, name: str, one: compare.Paired, p: float | None) -> list[object]:
    text, change = parts.text_of(metric), parts.change_of(metric)
    return [
        f"{evaluator}, {name}",
        one.items,
        text(one.first),
        text(one.second),
        change(one.difference.mean),
        f"{change(one.difference.low)} to {change(one.difference.high)}",
        one.better,
        one.worse,
        compare.p_text(p),
    ]


def curves(runs: Mapping[str, Run]) -> Section:
    """Draw the curves of runs (at least one) over each other."""
    figures = [
        chart("Training loss by round", {n: r.rounds.get("train_loss", {}) for n, r in runs.items()}, "nats/token")
    ]
    keys = dict.fromkeys((e, m) for run in runs.values() for _, e, m in run.validation if m == primary(e, run))
    for evaluator, metric in keys:
        found = {n: r.validation.get((r.own, evaluator, metric), {}) for n, r in runs.items()}
        title = f"{parts.title_of(evaluator, metric)} on validation data by round"
        figures.append(chart(title, found, metric.replace("_", " "), text=parts.text_of(metric)))
        figures.append(against_bytes(runs, (evaluator, metric)))
    figures.append(against_bytes(runs))
    errors = {n: r.rounds.get("aggregation_error", {}) for n, r in runs.items()}
    figures.append(chart("Aggregation error by round", errors, "relative error"))
    drawn = [one for one in figures if one is not None]
    return Section("curves", "Curves", grid(drawn) if drawn else paragraph("No round was finished."))


def _costs(runs: Mapping[str, Run]) -> Section:
    rows = [[name, *cost_row(run).values()] for name, run in runs.items()]
    return Section("costs", "What they cost", table(["run", *cost_row(next(iter(runs.values())))], rows))


def settings(runs: Mapping[str, Run]) -> Section:
    """Tell the keys in which the recipes differ."""
    leaves = {name: compare.flat(run.recipe) for name, run in runs.items()}
    keys = dict.fromkeys(key for one in leaves.values() for key in one)
    odd = [key for key in keys if len({repr(one.get(key)) for one in leaves.values()}) > 1]
    rows = [[key, *(parts.visible(one.get(key, "–")) for one in leaves.values())] for key in odd]
    body = table(["key", *runs], rows, "Where the recipes differ") if rows else paragraph("The recipes are the same.")
    return Section("settings", "Settings that differ", body)
