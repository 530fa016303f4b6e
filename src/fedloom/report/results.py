"""The first sections: what federated training brought, and the results by regime."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from fedloom.evaluate.stats import wilson
from fedloom.report import compare, parts, svg
from fedloom.report.parts import Section, figure, grid, paragraph, table
from fedloom.report.read import Run, ordered
from fedloom.results import measures

SWARM = 60
"""Clients whose single values are drawn beside a mean."""

FEW = 6
"""Clients below which their number alone forbids a verdict: even if all agree, chance does so in 2 of 2^5 cases."""


def primary(evaluator: str, run: Run) -> str | None:
    """Return the most telling metric of an evaluator among those that the run has."""
    found = {name: v for metrics in run.metrics.values() for name, v in metrics.get(evaluator, {}).items()}
    chosen = measures(evaluator, found)
    return chosen[0].metric if chosen else next(iter(found), None)


def answer(run: Run) -> Section:
    """Say in sentences whether federating helped, by how much, and how sure that is."""
    lines = []
    if not run.finished:
        asked = run.recipe.get("rounds", "?")
        lines.append(
            paragraph(
                f"This run has not come to its end: {run.done} of {asked} rounds are done, and what follows is as far "
                f"as it got. Go on with: fedloom run --resume {run.folder}",
                "warning",
            )
        )
    for regime, reasons in (run.summary.get("not_run") or {}).items():
        lines += [paragraph(f"Not measured: {regime}, {name}: {why}", "warning") for name, why in reasons.items()]
    names = list(dict.fromkeys(name for metrics in run.metrics.values() for name in metrics))
    for evaluator in names:
        lines += _told(run, evaluator)
    if not names:
        lines.append(paragraph("Nothing was measured on held-out data: the recipe names no evaluators."))
    elif run.finished and run.own == "federated" and "local" not in run.metrics:
        lines.append(
            paragraph(
                "Whether federating helps is not told by this run, only whether training does: it was not compared "
                "with clients that train alone. Set compare=[local] (and centralized) to find out.",
                "note",
            )
        )
    return Section("answer", "What federating brought" if run.own == "federated" else "What it brought", _join(lines))


def _told(run: Run, evaluator: str) -> list[Markup]:
    metric = primary(evaluator, run)
    if metric is None:
        return []
    text, title = parts.text_of(metric), parts.title_of(evaluator, metric)
    values = {r: run.metrics[r].get(evaluator, {}).get(metric) for r in ordered(run.metrics)}
    shown = ", ".join(f"{r} {text(v)}" for r, v in values.items() if v is not None)
    better = parts.direction(evaluator, metric)
    lines = [paragraph(svg.tag("<strong>{}</strong> {} ({})", title, shown, better or "on held-out data"))]
    for other in ("base", "local"):
        if other != run.own and values.get(other) is not None and values.get(run.own) is not None:
            found = against(run, evaluator, metric, other)
            lines += [paragraph(found)] if found else []
    return lines


def against(run: Run, evaluator: str, metric: str, other: str) -> Markup | None:
    """Compare the run's own regime with another one on the same items, or at the same clients."""
    name = {"base": "the untouched base", "local": "clients that train alone"}[other]
    lower = parts.direction(evaluator, metric) == "lower is better"
    a, b = (compare.items(run, evaluator, one) for one in (other, run.own))
    if not compare.apart(a, b):
        found = compare.pair(a, b)
        test = f", McNemar {compare.p_text(found.p)}" if found.p is not None else ""
        told = (
            f"on the same {found.items} items, {_points(found.difference.mean)} "
            f"(95 % interval {_points(found.difference.low)} to {_points(found.difference.high)}{test}); "
            f"{found.better} items gained, {found.worse} lost"
        )
        return _verdict(f"{run.own} against {name}", told, found.difference.low, found.difference.high, lower)
    mine, theirs = (run.tested.get((r, evaluator, metric), {}) for r in (run.own, other))
    if other in run.others:
        theirs = run.others[other].tested.get((other, evaluator, metric), {})
    at_clients = compare.over_clients(theirs, mine)
    if at_clients is None:
        return None
    difference, fell, rose = at_clients
    gained, lost = (fell, rose) if lower else (rose, fell)
    count = len([client for client in mine if client in theirs])
    told = f"mean change over clients {difference.mean:+.3g}; better for {gained} of {count} clients, worse for {lost}"
    what = f"{run.own} against {name}"
    if count < FEW:
        return svg.tag('<span class="verdict open">few clients</span> {}: {}', what, told)
    told += f" (95 % interval of the mean, over clients: {difference.low:+.3g} to {difference.high:+.3g})"
    return _verdict(what, told, difference.low, difference.high, lower)


def _verdict(what: str, told: str, low: float, high: float, lower: bool) -> Markup:
    kind = "open" if low <= 0 <= high else "good" if (high < 0) == lower else "bad"
    word = {"open": "no clear difference", "good": "better", "bad": "worse"}[kind]
    return svg.tag('<span class="verdict {}">{}</span> {}: {}', kind, word, what, told)


def _points(share: float) -> str:
    return f"{100 * share:+.1f} points"


def scores(run: Run) -> Section:
    """Draw every evaluator's main metric by regime, with intervals, and all metrics as a table."""
    names = list(dict.fromkeys(name for metrics in run.metrics.values() for name in metrics))
    figures = [one for name in names if (one := _by_regime(run, name)) is not None]
    figures += [one for name in names if (one := _by_round(run, name)) is not None]
    body = [grid(figures)] if figures else []
    body += [_all(run, name) for name in names]
    return Section("results", "Results on held-out data", _join(body) or paragraph("There are none."))


def _by_regime(run: Run, evaluator: str) -> Markup | None:
    metric = primary(evaluator, run)
    if metric is None:
        return None
    text, rows, notes = parts.text_of(metric), [], set()
    for regime in ordered(run.metrics):
        value = run.metrics[regime].get(evaluator, {}).get(metric)
        if value is None:
            continue
        dot, note = dot_of(run, evaluator, metric, regime)
        rows.append(dot)
        notes.add(note)
    if not rows:
        return None
    better = parts.direction(evaluator, metric)
    title = f"{parts.title_of(evaluator, metric)} by regime"
    behind = table(
        ["regime", metric.replace("_", " "), "low", "high"],
        [[d.name, text(d.value), *(None if v is None else text(v) for v in (d.low, d.high))] for d in rows],
    )
    note = ". ".join(sorted(filter(None, [better.capitalize(), *notes]))) + "."
    return figure(title, svg.dots(title, rows, metric.replace("_", " "), text), behind, note)


def dot_of(run: Run, evaluator: str, metric: str, regime: str) -> tuple[svg.Dot, str]:
    """Return a metric that a regime has with its interval, or with single clients around it, and a note on which."""
    value = run.metrics[regime][evaluator][metric]
    source = run.others.get(regime, run)
    found = [
        float(line["score"])
        for line in run.samples.get(evaluator, ())
        if line.get("regime") == regime and line.get("client") is None and line.get("score") is not None
    ]
    right = found and all(score in (0, 1) for score in found)
    # samples hold the main score alone, and a macro average is not a share of the items
    if right and math.isclose(sum(found) / len(found), value, abs_tol=0.02):
        low, high = wilson(round(sum(found)), len(found))
        note = f"Bars: 95 % intervals (Wilson, {len(found)} items)"
        return svg.Dot(regime, value, low, high, parts.tone(regime)), note
    clients = sorted(source.tested.get((regime, evaluator, metric), {}).values())
    swarm = parts.spread(clients, SWARM)
    return svg.Dot(regime, value, tone=parts.tone(regime), swarm=swarm), "Small dots: single clients" if swarm else ""


def _by_round(run: Run, evaluator: str) -> Markup | None:
    """Draw validation results in the course of the run."""
    metric = primary(evaluator, run)
    curves = {
        regime: source.validation[key]
        for regime, source in run.regimes.items()
        if metric is not None and (key := (regime, evaluator, metric)) in source.validation
    }
    if metric is None or not curves:
        return None
    text, title = parts.text_of(metric), f"{parts.title_of(evaluator, metric)} on validation data by round"
    bands = {name: _band(run.regimes[name], (name, evaluator, metric)) for name in curves}
    series = [svg.Series(name, sorted(curve.items()), parts.tone(name), bands[name]) for name, curve in curves.items()]
    drawing = svg.curves(title, series, ("round", metric.replace("_", " ")), (svg.plain, text))
    drawing += svg.legend([(one.name, one.tone) for one in series])
    note = "Shaded: 95 % intervals (Wilson)." if any(bands.values()) else ""
    return figure(title, drawing, parts.curve_table(list(curves), list(curves.values()), text), note)


def _band(source: Run, key: tuple[str, str, str]) -> list[tuple[float, float, float]]:
    regime, evaluator, metric = key
    low, high = (source.validation.get((regime, evaluator, f"{metric}_{end}"), {}) for end in ("low", "high"))
    return [(round_, low[round_], high[round_]) for round_ in sorted(low) if round_ in high]


def _all(run: Run, evaluator: str) -> Markup:
    regimes = [name for name in ordered(run.metrics) if evaluator in run.metrics[name]]
    columns = list(dict.fromkeys(name for regime in regimes for name in run.metrics[regime][evaluator]))
    rows = [[regime, *(_cell(run.metrics[regime][evaluator], name) for name in columns)] for regime in regimes]
    return table(["regime", *(name.replace("_", " ") for name in columns)], rows, f"{evaluator}: all metrics")


def _cell(metrics: Mapping[str, Any], name: str) -> str | None:
    value = metrics.get(name)
    base = name.removesuffix("_worst10")
    return None if value is None else parts.text_of(base)(value)


def _join(pieces: list[Markup]) -> Markup:
    return Markup("").join(pieces)
