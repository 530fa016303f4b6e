"""Charts as inline SVG, by pure functions from numbers to markup.

A chart is 400 units wide, so that its text can be read on a phone; colours are classes (`t0`, `t1`, ...), which the
page's style sheet sets for light, dark and print. Nothing is told by colour alone: curves have markers, marks have
titles, and a table stands behind every chart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 400.0, 52.0, 20.0, 12.0, 36.0
DENSE = 40
"""Points of a curve above which it has no markers."""
LONGEST = 400
"""Points of a curve that are drawn; a longer one is thinned out."""

Text = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Series:
    """A curve: (x, y) points in order of x, and its tone.

    Attributes:
        band: (x, low, high) of an interval around it, in order of x.
    """

    name: str
    points: Sequence[tuple[float, float]]
    tone: int
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True, slots=True)
class Dot:
    """An estimate with the ends of its interval, if it has one, and single values around it."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    tone: int = 0
    swarm: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear scale from values to places, with its ticks."""

    ticks: tuple[float, ...]
    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Return the place of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def axis(values: Sequence[float], start: float, end: float, count: int = 5, whole: bool = False) -> Axis:
    """Return an axis over values (at least one), with about `count` round ticks.

    Args:
        start, end: places of its ends.  whole: ticks are whole numbers.
    """
    low, high = min(values), max(values)
    if low == high:
        pad = 1.0 if whole else abs(low) * 0.05 or 0.1
        low, high = (low - pad if whole or low else low), high + pad
    step = _step((high - low) / count)
    step = max(1.0, round(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if whole:  # rounds: no empty margin before the first or after the last
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return Axis(tuple(i * step for i in range(first, last + 1)), low, high, start, end)
    return Axis(tuple(i * step for i in range(first, last + 1)), first * step, last * step, start, end)


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next((factor * power for factor in (1.0, 2.0, 5.0) if factor * power >= rough), 10 * power)


def plain(value: float) -> str:
    """Return a number in few digits."""
    return f"{value:.4g}"


def clip(text: str, size: int = 16) -> str:
    """Return a text that fits a label."""
    return text if len(text) <= size else f"{text[: size - 1]}…"


def tag(pattern: str, *values: object) -> Markup:
    """Return a piece of markup; values are escaped, numbers rounded."""
    shown = (f"{v:.2f}".rstrip("0").rstrip(".") if isinstance(v, float) else v for v in values)
    return Markup(pattern).format(*shown)


def _svg(title: str, height: float, body: Sequence[Markup]) -> Markup:
    head = tag('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">', WIDTH, height, title)
    return head + Markup("").join(body) + Markup("</svg>")


def _frame(x: Axis, y: Axis, names: tuple[str, str], texts: tuple[Text, Text]) -> list[Markup]:
    """Return grid lines, tick labels and axis titles."""
    parts = []
    for value in y.ticks:
        place = y.at(value)
        parts.append(tag('<line class="grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>', x.start, x.end, place))
        parts.append(tag('<text x="{}" y="{}" class="end">{}</text>', x.start - 6, place + 4, texts[1](value)))
    for value in x.ticks:
        parts.append(tag('<text x="{}" y="{}" class="mid">{}</text>', x.at(value), y.start + 15, texts[0](value)))
    parts.append(tag('<line class="base" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>', x.start, x.end, y.start))
    parts.append(tag('<text x="{}" y="{}" class="mid name">{}</text>', (x.start + x.end) / 2, y.start + 30, names[0]))
    return parts


def curves(title: str, series: Sequence[Series], names: tuple[str, str], texts: tuple[Text, Text]) -> Markup:
    """Return a line chart.

    Args:
        series: at least one point in all.
        names: of both axes; that of y stands above the chart.  texts: how values of both are told.
    """
    points = [point for one in series for point in one.points]
    rounds = all(float(px).is_integer() for px, _ in points) and max(px for px, _ in points) < 1e5
    x = axis([px for px, _ in points], LEFT, WIDTH - RIGHT, 5, whole=rounds)
    ends = [end for one in series for _, *both in one.band for end in both]
    y = axis([*(py for _, py in points), *ends], 240 - BOTTOM, TOP + 14)
    parts = [tag('<text x="0" y="10" class="name">{}</text>', names[1]), *_frame(x, y, (names[0], ""), texts)]
    for one in series:
        if one.band:
            around = [(px, high) for px, _, high in one.band] + [(px, low) for px, low, _ in reversed(one.band)]
            corners = " ".join(f"{x.at(px):.1f},{y.at(py):.1f}" for px, py in around)
            parts.append(tag('<polygon class="band t{}" points="{}"/>', one.tone, corners))
        kept = thin(one.points)
        path = " ".join(f"{x.at(px):.1f},{y.at(py):.1f}" for px, py in kept)
        parts.append(tag('<polyline class="curve t{}" points="{}"/>', one.tone, path))
        for px, py in kept if len(kept) <= DENSE else kept[-1:]:
            told = f"{one.name}: {texts[1](py)} at {names[0]} {texts[0](px)}"
            parts.append(marker(one.tone, x.at(px), y.at(py), told))
    return _svg(title, 240, parts)


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `LONGEST` points, the first and the last among them."""
    if len(points) <= LONGEST:
        return list(points)
    step = (len(points) - 1) / (LONGEST - 1)
    return [points[round(i * step)] for i in range(LONGEST)]


def marker(tone: int, x: float, y: float, title: str = "") -> Markup:
    """Return a mark whose form tells its tone too."""
    forms = (
        '<circle class="mark t{0}" cx="{1}" cy="{2}" r="3.4">{3}</circle>',
        '<path class="mark t{0}" d="M{1} {2}m-3.2 -3.2h6.4v6.4h-6.4z">{3}</path>',
        '<path class="mark t{0}" d="M{1} {2}m0 -4.4l4 7h-8z">{3}</path>',
        '<path class="mark t{0}" d="M{1} {2}m0 -4.6l4.6 4.6l-4.6 4.6l-4.6 -4.6z">{3}</path>',
        '<path class="mark t{0}" d="M{1} {2}m0 4.4l4 -7h-8z">{3}</path>',
    )
    return tag(forms[tone % len(forms)], tone, x, y, tag("<title>{}</title>", title) if title else "")


def legend(entries: Sequence[tuple[str, int]], *, marks: bool = True) -> Markup:
    """Return what tones stand for: (name, tone) pairs."""
    square = '<rect class="fill t{0}" x="1" y="1" width="10" height="10"/>'
    items = [
        tag(
            '<li><svg viewBox="0 0 12 12" aria-hidden="true">{}</svg>{}</li>',
            marker(tone, 6.0, 6.0) if marks else tag(square, tone),
            name,
        )
        for name, tone in entries
    ]
    return Markup('<ul class="legend">') + Markup("").join(items) + Markup("</ul>")


def dots(title: str, rows: Sequence[Dot], name: str, text: Text) -> Markup:
    """Return one row a value: its estimate, interval and swarm on a common scale named `name`."""
    return grouped_dots(title, [("", rows)], name, text)


def grouped_dots(title: str, groups: Sequence[tuple[str, Sequence[Dot]]], name: str, text: Text) -> Markup:
    """Return rows as `dots` does, in groups: (what stands over its rows, or "", rows); at least one row in all."""
    left = 92.0
    lines: list[str | Dot] = [one for head, rows in groups for one in (*([head] if head else ()), *rows)]
    tall = [22.0 if isinstance(one, str) else 30.0 for one in lines]
    height = TOP + sum(tall)
    found = [one for _, rows in groups for one in rows]
    ends = [v for one in found for v in (one.value, one.low, one.high, *one.swarm) if v is not None]
    x = axis(ends, left, WIDTH - 52, 4)
    parts = []
    for value in x.ticks:
        place = x.at(value)
        parts.append(tag('<line class="grid" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>', place, TOP, height))
        parts.append(tag('<text x="{}" y="{}" class="mid">{}</text>', place, height + 15, text(value)))
    y = TOP
    for one, size in zip(lines, tall, strict=True):
        if isinstance(one, str):
            form = '<text x="0" y="{}" class="strong">{}<title>{}</title></text>'
            parts.append(tag(form, y + 16, clip(one, 52), one))
        else:
            parts += _dot(one, x, y + size / 2, text)
        y += size
    parts.append(tag('<text x="{}" y="{}" class="mid name">{}</text>', (left + WIDTH - 52) / 2, height + 30, name))
    return _svg(title, height + BOTTOM, parts)


def _dot(one: Dot, x: Axis, y: float, text: Text) -> list[Markup]:
    parts = [tag('<text x="{}" y="{}" class="end">{}</text>', x.start - 8, y + 4, clip(one.name, 13))]
    parts += [tag('<circle class="speck t{}" cx="{}" cy="{}" r="2.6"/>', one.tone, x.at(v), y) for v in one.swarm]
    told = f"{one.name}: {text(one.value)}"
    if one.low is not None and one.high is not None:
        told += f", {text(one.low)} to {text(one.high)}"
        form = '<line class="span t{0}" x1="{1}" x2="{2}" y1="{3}" y2="{3}"/>'
        parts.append(tag(form, one.tone, x.at(one.low), x.at(one.high), y))
    parts.append(marker(one.tone, x.at(one.value), y, told))
    parts.append(tag('<text x="{}" y="{}" class="end strong">{}</text>', WIDTH, y + 4, text(one.value)))
    return parts


def stacks(
    title: str, rows: Sequence[tuple[str, Sequence[float]]], parts: Sequence[tuple[str, int]], text: Text
) -> Markup:
    """Return one horizontal bar a row, cut into parts.

    Args:
        rows: (name, values), a value for every part.  parts: (name, tone).  text: how values are told.
    """
    each = 26.0 if len(rows) <= 12 else 16.0
    height, left = TOP + each * len(rows), 92.0
    x = axis([0.0, max(sum(values) for _, values in rows) or 1.0], left, WIDTH - 24, 4)
    body = []
    for value in x.ticks:
        body.append(tag('<line class="grid" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>', x.at(value), TOP, height))
        body.append(tag('<text x="{}" y="{}" class="mid">{}</text>', x.at(value), height + 15, text(value)))
    for i, (name, values) in enumerate(rows):
        y, end = TOP + each * i, x.start
        body.append(tag('<text x="{}" y="{}" class="end">{}</text>', left - 8, y + each / 2 + 4, clip(name, 13)))
        for (part, tone), value in zip(parts, values, strict=True):
            width = x.at(value) - x.start
            if width > 0:
                told = tag("<title>{}, {}: {}</title>", name, part, text(value))
                form = '<rect class="fill t{}" x="{}" y="{}" width="{}" height="{}">{}</rect>'
                body.append(tag(form, tone, end, y + 2, width, each - 4, told))
            end += width
    return _svg(title, height + 22, body)


def heat(title: str, rows: Sequence[tuple[str, Sequence[float | None]]], columns: Sequence[str], text: Text) -> Markup:
    """Return a map of values, darker for higher ones; None is left hollow.

    Args:
        rows: (name, values), a value for every column.  columns: what they are, in order.
    """
    known = [v for _, values in rows for v in values if v is not None]
    low, high = min(known), max(known)
    each, left = min(22.0, max(8.0, 260.0 / len(rows))), 92.0
    wide, height = (WIDTH - left - 4) / len(columns), TOP + each * len(rows)
    gap = 1.0 if wide > 5 and each > 5 else 0.2
    body = []
    for i, (name, values) in enumerate(rows):
        y = TOP + each * i
        if each >= 11 or i % 2 == 0:
            body.append(tag('<text x="{}" y="{}" class="end">{}</text>', left - 8, y + each / 2 + 4, clip(name, 13)))
        for j, value in enumerate(values):
            place = left + wide * j, y, wide - gap, each - gap
            if value is None:
                body.append(tag('<rect class="hollow" x="{}" y="{}" width="{}" height="{}"/>', *place))
                continue
            depth = 0.08 + 0.92 * ((value - low) / (high - low) if high > low else 0.5)
            told = tag("<title>{}, round {}: {}</title>", name, columns[j], text(value))
            form = '<rect class="fill t0" x="{}" y="{}" width="{}" height="{}" fill-opacity="{}">{}</rect>'
            body.append(tag(form, *place, depth, told))
    for j in _spread(len(columns), 6):
        body.append(tag('<text x="{}" y="{}" class="mid">{}</text>', left + wide * (j + 0.5), height + 15, columns[j]))
    body.append(tag('<text x="{}" y="{}" class="mid name">round</text>', (left + WIDTH) / 2, height + 30))
    return _svg(title, height + BOTTOM, body)


def scale(low: float, high: float, text: Text) -> Markup:
    """Return what the shades of a heat map mean."""
    steps = Markup("").join(
        tag('<rect class="fill t0" x="{}" y="0" width="16" height="10" fill-opacity="{}"/>', 16.0 * i, 0.08 + 0.23 * i)
        for i in range(5)
    )
    form = '<p class="scale">{} <svg viewBox="0 0 80 10" aria-hidden="true">{}</svg> {}; hollow: no value</p>'
    return tag(form, text(low), steps, text(high))


def _spread(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` places of `count`, evenly spread, the first and the last among them."""
    if count <= wanted:
        return list(range(count))
    return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)]
