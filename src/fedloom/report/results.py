"""The first sections: what federated training brought, and the results by regime."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from markupsafe import Markup

from fedloom.evaluate import scored
from fedloom.evaluate.stats import holm
from fedloom.report import compare, parts, svg
from fedloom.report.compare import Paired
from fedloom.report.parts import Section, figure, grid, paragraph, table
from fedloom.report.read import Run, ordered
from fedloom.results import measures

SWARM = 60
"""Clients whose single values are drawn beside a mean."""

Band: TypeAlias = Sequence[tuple[float, float, float]]
"""(round, low, high) of the intervals around a curve."""

BANDS = (
    "Shaded: 95 % intervals, over clients where they are measured apart (bootstrap), else over items (Wilson where one "
    "mean counts right answers, bootstrap otherwise)."
)
"""What a note says of the bands around validation curves."""

AGAINST = {"base": "the untouched base", "local": "clients that train alone"}
"""What a run's own regime is compared with -> what it is called."""

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
    pairs = paired(run, names)
    for evaluator in names:
        lines += _told(run, evaluator, pairs)
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


Pairs: TypeAlias = Mapping[tuple[str, str], tuple[Paired, float | None]]
"""(evaluator, other regime) -> the comparison on the same items, and its p adjusted for all that the page tests."""


def paired(run: Run, names: Sequence[str]) -> Pairs:
    """Pair the run's own regime with the base and with local training, where both answered the same items.

    Args:
        names: evaluators.
    """
    found = {(name, other): one for name in names for other in AGAINST if (one := _pair(run, name, other)) is not None}
    adjusted = iter(holm([one.p for one in found.values() if one.p is not None]))
    return {key: (one, None if one.p is None else next(adjusted)) for key, one in found.items()}


def _pair(run: Run, evaluator: str, other: str) -> Paired | None:
    metric = primary(evaluator, run)
    if other == run.own or metric is None:
        return None
    a, b = (compare.items(run, evaluator, one) for one in (other, run.own))
    if compare.apart(a, b):
        return None
    found = compare.pair(a, b)
    told = ((other, found.first), (run.own, found.second))
    return found if all(_is(run, evaluator, metric, regime, value) for regime, value in told) else None


def _is(run: Run, evaluator: str, metric: str, regime: str, value: float) -> bool:
    """Return whether samples add up to a regime's reported metric: only then their interval may carry its name."""
    reported = run.metrics.get(regime, {}).get(evaluator, {}).get(metric)
    return reported is not None and math.isclose(reported, value, rel_tol=1e-6, abs_tol=1e-6)


def _told(run: Run, evaluator: str, pairs: Pairs) -> list[Markup]:
    metric = primary(evaluator, run)
    if metric is None:
        return []
    text, title = parts.text_of(metric), parts.title_of(evaluator, metric)
    values = {r: run.metrics[r].get(evaluator, {}).get(metric) for r in ordered(run.metrics)}
    shown = ", ".join(f"{r} {text(v)}" for r, v in values.items() if v is not None)
    better = parts.direction(evaluator, metric)
    lines = [paragraph(svg.tag("<strong>{}</strong> {} ({})", title, shown, better or "on held-out data"))]
    for other in AGAINST:
        if other == run.own or values.get(other) is None or values.get(run.own) is None:
            continue
        if (evaluator, other) in pairs:
            lines.append(paragraph(_on_items(run, evaluator, metric, other, pairs)))
        elif (found := _at_clients(run, evaluator, metric, other)) is not None:
            lines.append(paragraph(found))
    return lines


def _on_items(run: Run, evaluator: str, metric: str, other: str, pairs: Pairs) -> Markup:
    """Tell a comparison on the same items."""
    found, p = pairs[evaluator, other]
    lower = parts.direction(evaluator, metric) == "lower is better"
    change = parts.change_of(metric)
    test = f"; McNemar's test of right and wrong answers, {compare.p_text(p)} (Holm)" if p is not None else ""
    gained, lost = (found.worse, found.better) if lower else (found.better, found.worse)
    low, high = found.difference.low, found.difference.high
    told = (
        f"on the same {found.items} items, {metric.replace('_', ' ')} {change(found.difference.mean)} "
        f"(95 % interval by bootstrap over items: {change(low)} to {change(high)}{test}); "
        f"{gained} items gained, {lost} lost"
    )
    return _verdict(f"{run.own} against {AGAINST[other]}", told, low, high, lower)


def _at_clients(run: Run, evaluator: str, metric: str, other: str) -> Markup | None:
    """Compare the run's own regime with another one at the same clients, where each was measured apart."""
    lower = parts.direction(evaluator, metric) == "lower is better"
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
    what = f"{run.own} against {AGAINST[other]}"
    if count < FEW:
        return svg.tag('<span class="verdict open">few clients</span> {}: {}', what, told)
    told += f" (95 % interval of the mean, over clients: {difference.low:+.3g} to {difference.high:+.3g})"
    return _verdict(what, told, difference.low, difference.high, lower)


def _verdict(what: str, told: str, low: float, high: float, lower: bool) -> Markup:
    kind = "open" if low <= 0 <= high else "good" if (high < 0) == lower else "bad"
    word = {"open": "no clear difference", "good": "better", "bad": "worse"}[kind]
    return svg.tag('<span class="verdict {}">{}</span> {}: {}', kind, word, what, told)


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
    clients = sorted(source.tested.get((regime, evaluator, metric), {}).values())
    if clients:
        swarm = parts.spread(clients, SWARM)
        return svg.Dot(regime, value, tone=parts.tone(regime), swarm=swarm), "Small dots: single clients"
    items = compare.items(run, evaluator, regime)
    found = scored.estimate(items)
    if found is None or not _is(run, evaluator, metric, regime, found.interval.mean):
        return svg.Dot(regime, value, tone=parts.tone(regime)), ""
    note = f"Bars: 95 % intervals ({found.method}, {len(items)} items)"
    return svg.Dot(regime, value, found.interval.low, found.interval.high, parts.tone(regime)), note


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
    bands = {name: band(run.regimes[name], (name, evaluator, metric)) for name in curves}
    series = [svg.Series(name, sorted(curve.items()), parts.tone(name), bands[name]) for name, curve in curves.items()]
    drawing = svg.curves(title, series, ("round", metric.replace("_", " ")), (svg.plain, text))
    drawing += svg.legend([(one.name, one.tone) for one in series])
    note = BANDS if any(bands.values()) else ""
    return figure(title, drawing, parts.curve_table(list(curves), list(curves.values()), text), note)


def band(source: Run, key: tuple[str, str, str]) -> Band:
    """Return (round, low, high) of the intervals around a validation curve: (regime, evaluator, metric)."""
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
