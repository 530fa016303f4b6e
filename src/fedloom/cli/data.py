"""`fedloom data`: which client holds what."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.options import Debug, Imports, Recipe, SetFiles, Settings

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    from fedloom.data.federation import Drift, Federation
    from fedloom.data.partition import Partitioner

COLOURS = (
    *("red", "green", "yellow", "blue", "magenta", "cyan"),
    *("bright_red", "bright_green", "bright_yellow", "bright_blue", "bright_magenta", "bright_cyan"),
)
OTHER = "bright_black"
SHOWN = 20


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

    from fedloom import recipe as recipes
    from fedloom.client.models import load_tokenizer
    from fedloom.data.federation import build, split_table
    from fedloom.home import home
    from fedloom.types import RecipeError

    loaded = recipes.load(recipe, settings or (), set_file or ())
    with Console(stderr=True).status("reading and encoding the rows"):
        federation = build(loaded.data, load_tokenizer(loaded.model), loaded.seed, home() / "encoded")
    chosen = key or _key(loaded.data.partition, federation)
    _tell(Console(), federation, chosen, loaded.data.max_tokens)
    if out is not None:
        text = json.dumps(split_table(federation), indent=1, ensure_ascii=False)
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"--out {out}: {error.strerror}; choose a file in a folder that is there") from error
        typer.echo(f"split {federation.split_hash[:12]} written to {out}")


def _tell(console: Console, federation: Federation, key: str | None, longest: int) -> None:
    """Print where the rows come from, what was left out, who holds what, and the mean drift over `key`."""
    from fedloom.data.federation import drift

    found = {one.client: one for one in drift(federation, key)} if key else {}
    left, clients = federation.left, federation.clients
    lines = [f"{len(federation.rows):,} rows from {federation.source}"]
    if left.total:
        lines.append(f"left out: {left.too_long} longer than {longest} tokens, {left.no_label} without answer")
    if len(federation.public):
        lines.append(f"public: {len(federation.public):,} rows at the server")
    console.print("\n".join(lines), markup=False, highlight=False)
    console.print(_table(federation, found, key or "", console.is_terminal))
    lines = []
    if len(clients) > SHOWN:
        sizes = sorted(len(one.train) for one in clients.values())
        span = f"{sizes[0]:,} to {sizes[-1]:,}, median {sizes[len(sizes) // 2]:,}"
        lines.append(f"{SHOWN} of {len(clients):,} clients; training rows: {span}")
    if found:
        mean = sum(one.divergence for one in found.values()) / len(found)
        lines.append(f"mean drift {mean:.3f} bits over {key}")
    console.print("\n".join(lines), markup=False, highlight=False)


def _key(partition: Partitioner, federation: Federation) -> str | None:
    """Return the field that the partition splits by, else the category, else none."""
    if (key := partition.field()) is not None:
        return key
    return "category" if federation.rows and all("category" in row.fields for row in federation.rows) else None


def _table(federation: Federation, found: Mapping[str, Drift], key: str, coloured: bool) -> Table:
    """Return a row a client: counts, and where drift was `found`, lengths, divergence and shares of the categories."""
    from rich import box
    from rich.table import Table

    total = Counter[str]()
    for one in found.values():
        total.update(one.categories)
    names = [name for name, _ in total.most_common(len(COLOURS))]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=_legend(names, len(total)) if coloured else None)
    table.caption_style, table.caption_justify = "", "left"
    table.add_column("client", overflow="fold")
    for name in ("train", "valid.", "test"):
        table.add_column(name, justify="right", no_wrap=True)
    if found:
        table.add_column("tokens\n5/50/95 %", justify="right", no_wrap=True)
        table.add_column("drift", justify="right", no_wrap=True)
        table.add_column(key)
    for client, split in list(federation.clients.items())[:SHOWN]:
        name = f"{client} (unseen)" if client in federation.unseen else client
        counts = [f"{len(rows):,}" for rows in (split.train, split.validation, split.test)]
        if not found:
            table.add_row(name, *counts)
            continue
        one = found[client]
        shares = Shares(one.categories, names) if coloured else _in_words(one.categories)
        table.add_row(name, *counts, "/".join(f"{q:.0f}" for q in one.tokens), f"{one.divergence:.3f}", shares)
    return table


def _in_words(categories: Mapping[str, int]) -> str:
    """Return the three largest shares, for where there are no colours."""
    total = sum(categories.values())
    largest = Counter(categories).most_common(3)
    told = ", ".join(f"{name} {100 * count / total:.0f} %" for name, count in largest)
    return told + (", ..." if len(categories) > len(largest) else "")


@dataclass(frozen=True, slots=True)
class Shares:
    """A stacked bar as wide as its column: the shares of `names` in their colours, then those of all others."""

    categories: Mapping[str, int]
    names: Sequence[str]

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        return Measurement(min(12, options.max_width), min(48, options.max_width))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        bar, total, done, drawn = Text(no_wrap=True), sum(self.categories.values()), 0, 0
        counts = [self.categories.get(name, 0) for name in self.names]
        for count, colour in zip([*counts, total - sum(counts)], [*COLOURS[: len(counts)], OTHER], strict=True):
            done += count
            size = round(options.max_width * done / total) - drawn
            bar.append("█" * size, style=colour)
            drawn += size
        yield bar


def _legend(names: Sequence[str], count: int) -> Text:
    from rich.text import Text

    # no-break spaces keep a name beside its colour
    entries = [Text.assemble(("█\u00a0", colour), name) for name, colour in zip(names, COLOURS, strict=False)]
    if count > len(names):
        entries.append(Text.assemble(("█\u00a0", OTHER), f"{count - len(names)}\u00a0others"))
    return Text("  ").join(entries)
