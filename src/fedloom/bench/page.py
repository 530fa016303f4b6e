"""report.html of a bench: what its tables say, scores drawn over seeds, and the runs of one seed over each other."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from markupsafe import Markup

from fedloom.bench.grid import Outcome
from fedloom.bench.tables import COMPARED, COSTS, Bench, Row
from fedloom.report import overlay, parts, svg
from fedloom.report.page import FILE, write_sections
from fedloom.report.parts import Section, figure, grid, paragraph, table
from fedloom.report.read import Run, read


def write_page(bench: Bench, outcomes: Sequence[Outcome], command: str, folder: Path) -> Path:
    """Draw a bench, of one run or of many, and return the path of its page.

    Args:
        bench: the tables of `outcomes`.  command: what repeats the bench.  folder: where the page goes.

    Raises:
        RecipeError: a run folder is damaged.
    """
    done = [one for one in outcomes if one.summary]
    seeds = list(dict.fromkeys(one.cell.seed for one in outcomes))
    facts = [
        ("runs", f"{len(done)} of {len(outcomes)}"),
        ("recipes", str(len({one.cell.name for one in outcomes}))),
        ("variations", str(len({one.cell.label for one in outcomes}))),
        ("seeds", f"{len(seeds)} ({', '.join(map(str, seeds))})"),
    ]
    sections = [_scores(bench), _differences(bench), _costs(bench), _runs(outcomes, command)]
    sections += _first_seed({_name(o): read(o.cell.folder) for o in done if o.cell.seed == done[0].cell.seed})
    names = list(dict.fromkeys(one.cell.name for one in outcomes))
    title = f"Bench of {', '.join(names)}" if len(names) <= 4 else f"Bench of {len(names)} recipes"
    lead = "Scores are means over seeds with their standard deviations; every run is an ordinary run folder."
    return write_sections(folder / FILE, title, lead, facts, sections)


def _name(outcome: Outcome) -> str:
    return f"{outcome.cell.name}, {outcome.cell.label}"


def _scores(bench: Bench) -> Section:
    """Draw the main metric of every evaluator, and tell all metrics in a table."""
    body = Markup("")
    if bench.missing:
        runs = "run has" if len(bench.missing) == 1 else "runs have"
        body += paragraph(f"{len(bench.missing)} {runs} no result; see the reasons under Runs.", "warning")
    if not bench.rows:
        return Section("bench", "Scores", body + paragraph("There are none."))
    names: dict[str, list[str]] = {}
    for name in bench.metrics():
        names.setdefault(name.partition(" ")[0], []).append(name)
    body += grid([_figure(bench.rows, found[0]) for found in names.values()])
    body += Markup("").join(_table(bench, evaluator, found) for evaluator, found in names.items())
    return Section("bench", "Scores", body)


def _table(bench: Bench, evaluator: str, names: Sequence[str]) -> Markup:
    """Return the metrics of one evaluator: all in one table are wider than a printed page."""
    places = [bench.heads().index(name) for name in names]
    rows = [[", ".join(row[:3]), row[3], *(row[i] or None for i in places)] for row in bench.cells()]
    heads = ["recipe, variation, regime", "seeds", *(name.partition(" ")[2].replace("_", " ") for name in names)]
    return table(heads, rows, f"{evaluator}: mean ± standard deviation over seeds")


def _figure(rows: Sequence[Row], name: str) -> Markup:
    evaluator, _, metric = name.partition(" ")
    text, title = parts.text_of(metric), parts.title_of(evaluator, metric)
    groups, behind = [], list[list[object]]()
    for (recipe, variation), found in groupby(rows, key=lambda row: (row.recipe, row.variation)):
        dots = list[svg.Dot]()
        for row in found:
            if values := row.scores.get(name):
                mean = statistics.fmean(values)
                sd = statistics.stdev(values) if len(values) > 1 else None
                dot = svg.Dot(row.regime, mean, tone=parts.tone(row.regime, len(dots)))
                dots.append(dot if sd is None else replace(dot, low=mean - sd, high=mean + sd, swarm=values))
                shown = [text(mean), None if sd is None else f"± {text(sd)}"]
                behind.append([f"{recipe}, {variation}, {row.regime}", *shown, ", ".join(map(text, values))])
        groups += [(f"{recipe}, {variation}", dots)] if dots else []
    drawing = svg.grouped_dots(title, groups, metric.replace("_", " "), text)
    better = parts.direction(evaluator, metric).capitalize()
    several = any(one.swarm for _, dots in groups for one in dots)
    bars = "Bars: one standard deviation over seeds to either side. Small dots: single seeds." if several else ""
    note = " ".join(filter(None, [f"{better}." if better else "", bars]))
    heads = ["recipe, variation, regime", "mean", "standard deviation", "at each seed"]
    return figure(title, drawing, table(heads, behind), note)


def _differences(bench: Bench) -> Section:
    body = paragraph(
        "Second minus first, on the same items: each item counts once, by its mean score over seeds and clients. Where "
        "an evaluator keeps no samples (loss), the clients are the items, each with the main metric on its rows. The "
        "95 % interval is a paired bootstrap over items, and tells of other items like these; the deviation over "
        "seeds tells of other training runs. McNemar's exact test of right and wrong is made at each seed, its p "
        "adjusted (Holm) for all tests of this page.",
        "note",
    )
    for kind, found in bench.groups():
        rows = [
            [f"{where}: {second} against {first}", evaluator, *rest] for where, evaluator, first, second, *rest in found
        ]
        body += svg.tag("<h3>{}</h3>", kind) + table(["second against first", COMPARED[0], *COMPARED[3:]], rows)
    if not bench.comparisons:
        body += paragraph("No two results could be compared item by item.")
    body += Markup("").join(paragraph(f"Not paired. {one}", "warning") for one in bench.unpaired)
    return Section("differences", "Differences on the same items", body)


def _cost_heads(bench: Bench) -> list[str]:
    return [head for head in bench.heads() if head in COSTS.values()]


def _costs(bench: Bench) -> Section:
    heads = _cost_heads(bench)
    rows = [[", ".join(row[:3]), *row[len(row) - len(heads) :]] for row in bench.cells()]
    told = [[name, *(cell or None for cell in cells)] for name, *cells in rows if any(cells)]
    if not told:
        return Section("costs", "What they cost", paragraph("Nothing was trained."))
    return Section("costs", "What they cost", table(["recipe, variation, regime", *heads], told, "Means over seeds"))


def _runs(outcomes: Sequence[Outcome], command: str) -> Section:
    rows = [[f"{_name(one)}, seed {one.cell.seed}", one.cell.folder] for one in outcomes if one.summary]
    body = svg.tag('<p class="label">To repeat it</p><pre class="command">{}</pre>', command)
    for one in outcomes:
        if not one.summary:
            body += paragraph(f"No result: {_name(one)}, seed {one.cell.seed}: {parts.visible(one.reason)}", "warning")
    body += table(["run", "folder"], rows, "Runs with a result") if rows else Markup("")
    return Section("runs", "Runs", body)


def _first_seed(runs: Mapping[str, Run]) -> list[Section]:
    """Lay the runs of one seed over each other."""
    return [overlay.curves(runs), *([overlay.settings(runs)] if len(runs) > 1 else [])] if runs else []
