"""The sections on the course of training and on what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from types import MappingProxyType
from typing import Any

from markupsafe import Markup

from fedloom.cost import beside, human_flops
from fedloom.report import parts, svg
from fedloom.report.parts import Section, figure, grid, paragraph, table
from fedloom.report.read import Curve, Run
from fedloom.report.results import BANDS, Band, band, primary
from fedloom.units import human_bytes, human_seconds

PHASES = ("set-up", "training", "beside training", "between", "evaluation", "other")
PHASE_TONES = (4, 0, 2, 3, 1, 5)
PROCESS_PEAK = ", or, where the system does not tell that apart, from the start of the process on"


def course(run: Run) -> Section:
    """Draw losses by round, bytes against them, and the aggregation error."""
    figures = [one for one in (_loss(run), _validation_loss(run), _bytes(run), _aggregation(run)) if one is not None]
    body = grid(figures) if figures else paragraph("No round was finished.")
    return Section("course", "Course of training", body)


def _loss(run: Run) -> Markup | None:
    found = {name: one.rounds["train_loss"] for name, one in run.regimes.items() if one.rounds.get("train_loss")}
    note = "Token-weighted mean over the round's clients, in nats per trained token; lower is better."
    return chart("Training loss by round", found, "nats per token", note)


def _validation_loss(run: Run) -> Markup | None:
    """Draw training loss against validation loss, so that overfitting shows."""
    curve = run.validation.get((run.own, "loss", "loss"))
    if not curve:
        return None
    name = f"{run.own}, validation"
    found = {f"{run.own}, training": run.rounds.get("train_loss", {}), name: curve}
    around = band(run, (run.own, "loss", "loss"))
    note = "Validation rows are never trained on." + (f" {BANDS}" if around else "")
    return chart("Training and validation loss", found, "nats per token", note, bands={name: around})


def chart(
    title: str,
    curves: Mapping[str, Curve],
    unit: str,
    note: str = "",
    text: svg.Text = svg.plain,
    bands: Mapping[str, Band] = MappingProxyType({}),
) -> Markup | None:
    """Return a figure of curves by round, or None where there is nothing to draw.

    Args:
        curves: name -> curve.  unit: of the values.  text: how values are told.
        bands: name -> the intervals around that curve.
    """
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return None
    series = [
        svg.Series(name, sorted(curve.items()), parts.tone(name, i), bands.get(name, ()))
        for i, (name, curve) in enumerate(curves.items())
    ]
    drawing = svg.curves(title, series, ("round", unit), (svg.plain, text))
    drawing += svg.legend([(one.name, one.tone) for one in series])
    return figure(title, drawing, parts.curve_table(list(curves), list(curves.values()), text), note)


def traffic(run: Run) -> Curve:
    """Return the bytes that have crossed the wire by the end of each round, both ways."""
    down, up = (run.rounds.get(name, {}) for name in ("bytes_down", "bytes_up"))
    rounds = sorted(down)
    return dict(zip(rounds, accumulate(down[r] + up.get(r, 0.0) for r in rounds), strict=True))


def against_bytes(runs: Mapping[str, Run], key: tuple[str, str] | None = None) -> Markup | None:
    """Draw a score against the bytes it took: validation where it was measured, else the training loss.

    Args:
        runs: what a curve is called -> its run.  key: evaluator and metric; None: the training loss.
    """
    series, rows = [], []
    for i, (name, run) in enumerate(runs.items()):
        sent = traffic(run)
        curve = run.rounds.get("train_loss", {}) if key is None else run.validation.get((run.own, *key), {})
        points = [(sent[r], v) for r, v in sorted(curve.items()) if r in sent]
        if points and points[-1][0] > 0:
            series.append(svg.Series(name, points, parts.tone(name, i)))
            rows += [[name, human_bytes(x), svg.plain(y)] for x, y in parts.spread(points)]
    if not series:
        return None
    what = "training loss" if key is None else f"{parts.title_of(*key)} on validation data"
    text = svg.plain if key is None else parts.text_of(key[1])
    title = f"Bytes against {what}"
    drawing = svg.curves(title, series, ("bytes down and up so far", what), (parts.bytes_text, text))
    drawing += svg.legend([(one.name, one.tone) for one in series])
    return figure(title, drawing, table(["curve", "bytes", what], rows), "All clients together, as encoded.")


def _bytes(run: Run) -> Markup | None:
    for _, evaluator, metric in run.validation:
        if metric == primary(evaluator, run) and (found := against_bytes({run.own: run}, (evaluator, metric))):
            return found
    return against_bytes({run.own: run})


def _aggregation(run: Run) -> Markup | None:
    curves = {name: one.rounds.get("aggregation_error", {}) for name, one in run.regimes.items()}
    note = (
        "How far the new global product BA is from the mean of the clients' products, as a share of that mean: what "
        "averaging A and B apart loses. Zero is exact."
    )
    return chart("Aggregation error by round", curves, "relative error", note)


def costs(run: Run) -> Section:
    """Draw where the time went, and tell all costs of every regime."""
    regimes = {name: one for name, one in run.regimes.items() if one.rounds or one.summary}
    figures = [one for one in (_phases(regimes), _traffic_bars(regimes)) if one is not None]
    body = grid(figures) if figures else Markup("")
    rows = [[name, *(row.values())] for name, one in regimes.items() if (row := cost_row(one))]
    if rows:
        body += table(["regime", *cost_row(run)], rows, "What each regime cost")
    note = (
        "Bytes are of encoded messages, all clients together. FLOPs are those of the equations, without padding or "
        "recomputation; those beside training are of gradients, scores, embeddings and generated texts that the method "
        "asked for. Peak memory is of the main process from the regime's start on"
        + ("" if all(one.summary.get("peak_of") == "regime" for one in regimes.values()) else PROCESS_PEAK)
        + ". A dash: not known (energy: this machine reports none)."
    )
    return Section("costs", "What it cost", body + paragraph(note, "note"))


def cost_row(run: Run) -> dict[str, str | None]:
    """Return every cost of a run by name, told for people."""
    known, rounds = run.summary, run.rounds

    def of(name: str, curve: str) -> float | None:
        found = known.get(name)
        return found if found is not None else (sum(rounds[curve].values()) if rounds.get(curve) else None)

    def told(value: Any, text: Any) -> str | None:
        return None if value is None else text(value)

    energy = known.get("energy_joules")
    return {
        "rounds": str(known.get("rounds", run.done)),
        "bytes down": told(of("bytes_down", "bytes_down"), human_bytes),
        "bytes up": told(of("bytes_up", "bytes_up"), human_bytes),
        "trained tokens": told(of("trained_tokens", "tokens"), lambda v: f"{v:,.0f}"),
        "FLOPs of training": told(of("flops", "flops"), human_flops),
        "beside training": told(beside(known, "flops"), human_flops),
        "of evaluation": told(known.get("evaluate_flops"), human_flops),
        "tokens/s": told(known.get("tokens_per_second"), lambda v: f"{v:,.0f}"),
        "time": told(known.get("wall_seconds"), human_seconds),
        "peak memory": told(known.get("peak_rss_bytes"), human_bytes),
        "peak GPU": told(known.get("peak_device_bytes") or None, human_bytes),
        "energy": told(energy, lambda v: f"{v / 1000:,.1f} kJ"),
        "rejected": told(known.get("rejected"), str),
    }


def phases(run: Run) -> list[float]:
    """Return the seconds of each of `PHASES`; workers side by side count once."""
    known = run.summary
    rounds = known.get("round_seconds", sum(run.rounds.get("seconds", {}).values()))
    training = min(rounds, known.get("fit_seconds", sum(run.rounds.get("fit_seconds", {}).values())))
    more = min(rounds - training, beside(known, "seconds") or 0.0)
    setup, evaluation = known.get("setup_seconds", 0.0), known.get("evaluate_seconds", 0.0)
    rest = known.get("wall_seconds", 0.0) - setup - rounds - evaluation
    return [setup, training, more, rounds - training - more, evaluation, max(0.0, rest)]


def _phases(regimes: Mapping[str, Run]) -> Markup | None:
    rows = [(name, phases(one)) for name, one in regimes.items()]
    if not any(sum(values) for _, values in rows):
        return None
    legend = list(zip(PHASES, PHASE_TONES, strict=True))
    most = max(sum(values) for _, values in rows)
    unit, size = ("h", 3600) if most > 7200 else ("min", 60) if most > 180 else ("s", 1)
    scaled = [(name, [value / size for value in values]) for name, values in rows]
    drawing = svg.stacks("Time by phase", scaled, legend, lambda v: f"{v:.3g} {unit}")
    drawing += svg.legend(legend, marks=False)
    behind = table(["regime", *PHASES], [[name, *(f"{v:.1f} s" for v in values)] for name, values in rows])
    note = (
        "Beside training: what else clients compute. Between: messages, aggregation, the server's step. Other: "
        "checkpoints and files. Set-up is shared."
    )
    return figure("Time by phase", drawing, behind, note)


def _traffic_bars(regimes: Mapping[str, Run]) -> Markup | None:
    names = ("bytes_down", "bytes_up")
    rows = [(n, [sum(one.rounds.get(name, {}).values()) for name in names]) for n, one in regimes.items()]
    if not any(sum(values) for _, values in rows):
        return None
    legend = [("down, to the clients", 2), ("up, to the server", 0)]
    drawing = svg.stacks("Bytes on the wire", rows, legend, parts.bytes_text) + svg.legend(legend, marks=False)
    behind = table(["regime", "down", "up"], [[name, *map(human_bytes, values)] for name, values in rows])
    return figure("Bytes on the wire", drawing, behind, "Encoded messages of all clients and rounds.")
