"""`fedloom data`: which client holds what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.options import Debug, Imports, Recipe, SetFiles, Settings

if TYPE_CHECKING:
    from rich.text import Text

    from fedloom.data.federation import Federation
    from fedloom.data.partition import Partitioner

BASIC = ("red", "green", "yellow", "blue", "magenta", "cyan", "bright_red", "bright_green", "bright_yellow")
COLOURS = (*BASIC, "bright_blue", "bright_magenta", "bright_cyan", "white")
SHOWN, WIDTH = 20, 40


def data(
    recipe: Recipe,
    settings: Settings = None,
    set_file: SetFiles = None,
    key: Annotated[str | None, typer.Option(metavar="FIELD", help="Field whose distribution is compared.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the split (client -> row ids) as JSON.")
    ] = None,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Show how a recipe's rows are split over clients: counts, categories, lengths and drift.

    Drift is the Jensen-Shannon divergence, in bits, of a client's categories to the whole: 0 is alike, 1 is disjoint.

    [bold]Examples[/]

    fedloom data demo

    fedloom data demo data.partition=dirichlet data.partition.alpha=0.1 data.clients=8
    """
    from rich.console import Console
    from rich.table import Table

    from fedloom import recipe as recipes
    from fedloom.client.models import load_tokenizer
    from fedloom.data.federation import build, drift, split_table
    from fedloom.home import home

    loaded = recipes.load(recipe, settings or (), set_file or ())
    progress = Console(stderr=True)
    with progress.status("reading and encoding the rows"):
        tokenizer = load_tokenizer(loaded.model)
        federation = build(loaded.data, tokenizer, loaded.seed, home() / "encoded")
    console, chosen = Console(), key or _key(loaded.data.partition, federation)
    found = drift(federation, chosen) if chosen else []
    left = federation.left
    console.print(f"[bold]{len(federation.rows):,} rows[/] from {federation.source}", highlight=False)
    if left.total:
        console.print(
            f"left out: {left.too_long} longer than {loaded.data.max_tokens} tokens, {left.no_label} without answer"
        )
    values = sorted({value for one in found for value in one.categories})
    table = Table(header_style="bold")
    for name in ("client", "train", "valid.", "test", "tokens 5/50/95 %", "drift", chosen or ""):
        table.add_column(name, justify="left" if name in ("client", chosen) else "right", no_wrap=name != chosen)
    for one in found[:SHOWN]:
        split = federation.clients[one.client]
        lengths = "/".join(f"{q:.0f}" for q in one.tokens)
        name = f"{one.client} (unseen)" if one.client in federation.unseen else one.client
        counts = [str(len(rows)) for rows in (split.train, split.validation, split.test)]
        table.add_row(name, *counts, lengths, f"{one.divergence:.3f}", _bar(one.categories, values))
    for client in [] if found else list(federation.clients)[:SHOWN]:
        split = federation.clients[client]
        table.add_row(client, *(str(len(rows)) for rows in (split.train, split.validation, split.test)), "", "", "")
    console.print(table)
    if len(federation.clients) > SHOWN:
        console.print(f"... and {len(federation.clients) - SHOWN:,} more clients")
    if values:
        console.print(_legend(values))
    if found:
        mean = sum(one.divergence for one in found) / len(found)
        console.print(f"mean drift {mean:.3f} bits over {chosen}; split {federation.split_hash[:12]}", highlight=False)
    if out is not None:
        out.write_text(json.dumps(split_table(federation), indent=1, ensure_ascii=False), encoding="utf-8")
        console.print(f"split written to {out}")


def _key(partition: Partitioner, federation: Federation) -> str | None:
    """Return the field that the partition splits by, else the category, else none."""
    if (key := getattr(partition, "key", None)) is not None:
        return str(key)
    return "category" if federation.rows and all("category" in row.fields for row in federation.rows) else None


def _bar(categories: Mapping[str, int], values: list[str]) -> Text:
    """Return a stacked bar of the shares of `values`, one colour each."""
    from rich.text import Text

    bar, total, done, shown = Text(), sum(categories.values()), 0, 0
    for i, value in enumerate(values):
        done += categories.get(value, 0)
        size = round(WIDTH * done / total) - shown
        bar.append("█" * size, style=COLOURS[i % len(COLOURS)])
        shown += size
    return bar


def _legend(values: list[str]) -> Text:
    from rich.text import Text

    legend = Text()
    for i, value in enumerate(values[: 2 * len(COLOURS)]):
        legend.append("█ ", style=COLOURS[i % len(COLOURS)])
        legend.append(f"{value}  ")
    return legend
