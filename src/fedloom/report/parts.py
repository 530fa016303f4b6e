"""The pieces that sections are made of: figures with a table behind them, tables, and how values are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from markupsafe import Markup

from fedloom.evaluate.view import ADAPTED
from fedloom.report.svg import Text, plain, tag
from fedloom.results import SHARES, measures

T = TypeVar("T")
TONE = {"federated": 0, "local": 1, "centralized": 2, "personal": 3, "base": 4, "unseen": 5}
TONE |= {f"{regime}{ADAPTED}": 6 + i for i, regime in enumerate(("federated", "unseen", "local"))}
"""Regime -> its tone on every chart of a page."""
MOST_ROWS = 60
"""Rows of a table or a chart about clients; of more, evenly spread ones stand for all."""
CONTROL = {i: chr(0x2400 + i) for i in range(32) if chr(i) not in "\n\t"} | {0x7F: "␡"}


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page under its own heading."""

    id: str
    title: str
    body: Markup


def tone(regime: str, place: int = 0) -> int:
    """Return the tone of a regime, or of the `place`-th of other things."""
    return TONE.get(regime, 6 + place % 6)


def text_of(metric: str) -> Text:
    """Return how values of a metric are told."""
    return (lambda value: f"{100 * value:.1f} %") if metric in SHARES else plain


def change_of(metric: str) -> Text:
    """Return how differences of a metric are told."""
    return (lambda share: f"{100 * share:+.1f} points") if metric in SHARES else "{:+.3g}".format


def title_of(evaluator: str, metric: str) -> str:
    """Return what a metric is called."""
    name = metric.replace("_", " ")
    return name if name == evaluator else f"{evaluator}: {name}"


def bytes_text(count: float) -> str:
    """Return a number of bytes in few digits, for an axis."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def direction(evaluator: str, metric: str) -> str:
    """Return which way a metric is better, in words, or "" where that is not known."""
    found = measures(evaluator, {metric: 0.0})
    higher = found[0].higher if found else None
    return "" if higher is None else "higher is better" if higher else "lower is better"


def visible(text: object) -> str:
    """Return a text whose control characters can be seen; nothing is null, as in a recipe."""
    return "null" if text is None else str(text).translate(CONTROL)


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> Markup:
    """Return a table: the first column names the rows, numbers stand on the right; None is a dash."""
    head = Markup("").join(tag('<th scope="col">{}</th>', one) for one in heads)
    lines = []
    for first, *rest in rows:
        cells = Markup("").join(tag("<td>{}</td>", "–" if one is None else one) for one in rest)
        lines.append(tag('<tr><th scope="row">{}</th>{}</tr>', first, cells))
    form = (
        '<div class="scroll" tabindex="0" role="region" aria-label="{0}"><table>{1}'
        "<thead><tr>{2}</tr></thead><tbody>{3}</tbody></table></div>"
    )
    told = tag("<caption>{}</caption>", caption) if caption else ""
    return tag(form, caption or "table", told, head, Markup("").join(lines))


def figure(title: str, drawing: Markup, behind: Markup, note: str = "") -> Markup:
    """Return a chart with its title, a note, and the numbers behind it."""
    form = (
        "<figure><figcaption>{}</figcaption>{}{}<details><summary>The numbers<span> of: {}</span></summary>{}"
        "</details></figure>"
    )
    title = title[:1].upper() + title[1:]
    return tag(form, title, drawing, tag('<p class="note">{}</p>', note) if note else "", title, behind)


def grid(figures: Sequence[Markup]) -> Markup:
    """Return figures side by side where there is room."""
    return tag('<div class="grid-of-figures">{}</div>', Markup("").join(figures))


def paragraph(text: str | Markup, kind: str = "") -> Markup:
    """Return a paragraph."""
    return tag('<p class="{}">{}</p>', kind, text) if kind else tag("<p>{}</p>", text)


def curve_table(names: Sequence[str], curves: Sequence[dict[int, float]], text: Text) -> Markup:
    """Return curves as a table of rounds; of many rounds, evenly spread ones."""
    rounds = sorted({round_ for curve in curves for round_ in curve})
    rows = [
        [round_, *(text(curve[round_]) if round_ in curve else None for curve in curves)] for round_ in spread(rounds)
    ]
    return table(["round", *names], rows)


def spread(items: Sequence[T], most: int = MOST_ROWS) -> list[T]:
    """Return at most `most` items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
