"""The section on the clients: who has what, how each fared by round, and what training changed for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from fedloom.report import parts, svg
from fedloom.report.parts import Section, figure, grid, paragraph, table
from fedloom.report.read import SPLITS, Curve, Run

COLUMNS = 50
"""Rounds of the heat map; of more, neighbours are averaged."""
ROWS = 40
"""Clients of a chart; of more, evenly spread ones are drawn, in order of what the chart shows."""
KINDS = 11
"""Values that have a colour of their own; rarer ones are drawn together."""


def clients(run: Run) -> Section:
    """Draw the split, losses by client and round, and the change of every client's loss."""
    figures = [one for one in (_who_has_what(run), _sizes(run), _heat(run), *_changes(run)) if one is not None]
    body = grid(figures) if figures else paragraph("Nothing is known of single clients.")
    return Section("clients", "The clients", body)


def _note(shown: int, all_: int, order: str) -> str:
    return "" if shown == all_ else f"{shown} of {all_:,} clients, evenly spread in order of {order}."


def _who_has_what(run: Run) -> Markup | None:
    """Draw the rows of every client by their kind."""
    key, values = run.composition.get("key"), list(run.composition.get("values", ()))
    counts: Mapping[str, Sequence[int]] = run.composition.get("counts", {})
    if key is None or not counts:
        return None
    chosen = parts.spread(sorted(counts, key=lambda name: -sum(counts[name])), ROWS)
    chosen = [name for name in counts if name in set(chosen)]
    rows = [(name, _merged([float(n) for n in counts[name]])) for name in chosen]
    names = values[:KINDS] + (["others"] if len(values) > KINDS else [])
    legend = [(str(name) or "(none)", i) for i, name in enumerate(names)]
    title = f"Rows of every client by {key}"
    drawing = svg.stacks(title, rows, legend, lambda v: f"{v:,.0f}") + svg.legend(legend, marks=False)
    behind = table(["client", *(str(v) for v in values)], [[name, *counts[name]] for name in chosen])
    return figure(title, drawing, behind, _note(len(chosen), len(counts), "size"))


def _merged(counts: Sequence[float]) -> list[float]:
    return [*counts[:KINDS], sum(counts[KINDS:])] if len(counts) > KINDS else list(counts)


def _sizes(run: Run) -> Markup | None:
    """Draw how the rows of every client are split."""
    if not run.sizes:
        return None
    order = sorted(run.sizes, key=lambda name: -sum(run.sizes[name]))
    kept = set(parts.spread(order, ROWS))
    chosen = [name for name in run.sizes if name in kept]
    rows = [(name, [float(n) for n in run.sizes[name]]) for name in chosen]
    legend = list(zip(SPLITS, (0, 2, 1), strict=True))
    title = "Rows of every client by split"
    drawing = svg.stacks(title, rows, legend, lambda v: f"{v:,.0f}") + svg.legend(legend, marks=False)
    behind = table(["client", *SPLITS], [[name, *run.sizes[name]] for name in chosen])
    return figure(title, drawing, behind, _note(len(chosen), len(run.sizes), "size"))


def _heat(run: Run) -> Markup | None:
    """Draw the training loss of clients by round."""
    if not run.losses:
        return None
    order = sorted(run.losses, key=lambda name: run.losses[name][max(run.losses[name])])
    chosen = parts.spread(order, ROWS)
    if len(run.losses) <= ROWS:
        chosen = list(run.losses)
    bins = _bins(run.done)
    rows = [(name, [_mean(run.losses[name], bin_) for bin_ in bins]) for name in chosen]
    columns = [str(b[0]) if len(b) == 1 else f"{b[0]}–{b[-1]}" for b in bins]
    known = [v for _, values in rows for v in values if v is not None]
    if not known:
        return None
    title = "Training loss of clients by round"
    drawing = svg.heat(title, rows, columns, svg.plain) + svg.scale(min(known), max(known), svg.plain)
    behind = table(
        ["client", *columns], [[name, *(None if v is None else svg.plain(v) for v in values)] for name, values in rows]
    )
    return figure(title, drawing, behind, _note(len(chosen), len(run.losses), "their last loss"))


def _bins(rounds: int) -> list[range]:
    size = max(1, math.ceil(rounds / COLUMNS))
    return [range(first, min(first + size, rounds + 1)) for first in range(1, rounds + 1, size)]


def _mean(curve: Curve, rounds: range) -> float | None:
    values = [curve[r] for r in rounds if r in curve]
    return float(np.mean(values)) if values else None


def _changes(run: Run) -> list[Markup]:
    """Draw each client's held-out loss in every regime, those first whom training served worst."""
    found = {"base": run.tested.get(("base", "loss", "loss"), {})}
    found |= {name: one.tested.get((name, "loss", "loss"), {}) for name, one in run.regimes.items()}
    found = {name: values for name, values in found.items() if values and not _joined(values, run)}
    own = found.get(run.own)
    if not own:
        return []
    base = found.get("base", {})
    order = sorted(own, key=lambda name: base.get(name, math.inf) - own[name])
    chosen = parts.spread(order, ROWS)
    title = "Held-out loss of every client"
    dots = [svg.Dot(name, own[name], *_ends(base, own, name), tone=parts.tone(run.own)) for name in chosen]
    behind = table(
        ["client", *found],
        [[n, *(svg.plain(v[n]) if n in v else None for v in found.values())] for n in chosen],
    )
    worse = sum(own[name] > base[name] for name in own if name in base)
    note = f"Mark: {run.own}; the line leads to the base. Worse than the base: {worse} of {len(own):,} clients. "
    drawing = svg.dots(title, dots, "nats per token, lower is better", svg.plain)
    return [figure(title, drawing, behind, note + _note(len(chosen), len(own), "gain"))]


def _ends(base: Mapping[str, float], own: Mapping[str, float], name: str) -> tuple[float | None, float | None]:
    if name not in base:
        return None, None
    return min(base[name], own[name]), max(base[name], own[name])


def _joined(values: Mapping[str, float], run: Run) -> bool:
    """Return whether a regime measured other participants than the run's clients, such as all rows in one place."""
    return bool(run.sizes) and not any(name in run.sizes for name in values)
