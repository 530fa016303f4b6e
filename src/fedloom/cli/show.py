"""`fedloom show` and `fedloom list`: what there is, and what a recipe says once it is resolved."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.options import Debug, Imports, SetFiles, Settings

if TYPE_CHECKING:
    from rich.console import Console

    from fedloom.parts import Part
    from fedloom.recipe import Recipe


def show(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE|RUN", help="A shipped recipe, a YAML file, or a run folder.")
    ] = None,
    settings: Settings = None,
    set_file: SetFiles = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")] = False,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Print a recipe with every key, or a run's recipe and results.

    [bold]Examples[/]

    fedloom show demo trainer.lr=1e-3

    fedloom show runs/demo

    fedloom show --schema > recipe.schema.json
    """
    from rich.console import Console

    from fedloom import recipe as recipes
    from fedloom.outcome import read_summary
    from fedloom.results import results
    from fedloom.types import RecipeError

    if schema:
        typer.echo(json.dumps(recipes.Recipe.model_json_schema(), indent=1))
        return
    if recipe is None:
        raise RecipeError("name a recipe or a run folder, or ask for --schema")
    console, folder = Console(), Path(recipe)
    is_run = (folder / "recipe.yaml").is_file()
    loaded = recipes.load(folder / "recipe.yaml" if is_run else recipe, settings or (), set_file or ())
    _print_yaml(console, loaded.to_yaml())
    if is_run and (summary := read_summary(folder)):
        console.print(results(summary["metrics"]))


def _print_yaml(console: Console, text: str) -> None:
    from rich.syntax import Syntax

    if console.is_terminal:
        console.print(Syntax(text, "yaml", background_color="default", word_wrap=True))
    else:
        typer.echo(text, nl=False)


def list_parts(
    family: Annotated[
        str | None,
        typer.Argument(metavar="[FAMILY]", help="One family, such as aggregator; recipes; or algorithms, as a table."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Tell the bytes of algorithms with this recipe's model.")
    ] = None,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """List the shipped recipes and every part by family.

    [bold]Examples[/]

    fedloom list

    fedloom list recipes

    fedloom list aggregator

    fedloom list algorithms --recipe demo
    """
    from rich.console import Console
    from rich.text import Text

    from fedloom import recipe as recipes
    from fedloom.types import RecipeError, suggest

    console, found = Console(), families()
    if family == "algorithms":
        _algorithms(console, None if recipe is None else recipes.load(recipe))
        return
    if recipe is not None:
        raise RecipeError("--recipe goes with `fedloom list algorithms`, whose bytes it tells")
    family = family.removesuffix("s") if family is not None and family not in found else family
    if family is not None and family not in ("recipe", *found):
        raise RecipeError(
            f"there is no family {family!r}{suggest(family, found)}; allowed: recipes, algorithms, {', '.join(found)}"
        )
    if family in (None, "recipe"):
        rows = [(name, text.splitlines()[0].lstrip("# "), "") for name, text in recipes.shipped().items()]
        _print(console, "shipped recipes, and keys to lay over them (_tiny)", rows)
    for name in found if family is None else [family] if family in found else []:
        parts = sorted(found[name].known.items())
        rows = [(key, (inspect.getdoc(one) or "").splitlines()[0], ", ".join(one.model_fields)) for key, one in parts]
        _print(console, name, rows)
    if family is None:
        console.print(Text("fedloom show RECIPE prints a recipe with every key.", "dim"))


def _algorithms(console: Console, recipe: Recipe | None) -> None:
    """Print what each algorithm sends, keeps, costs and goes together with."""
    from rich.table import Table
    from rich.text import Text

    from fedloom.cli import algorithms

    heads, rows = algorithms.table(recipe)
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for i, head in enumerate(heads):
        right = head in algorithms.BYTES
        grid.add_column(
            head,
            style="cyan" if i == 0 else "",
            no_wrap=i < 2 or right,
            overflow="fold",
            justify="right" if right else "left",
        )
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    console.print(grid)
    console.print(
        Text("\nA, B: the LoRA factors. Bytes: tensors of one client's message in a round after the first.", "dim")
    )
    for name, why in algorithms.misfits(recipe) if recipe is not None else ():
        console.print(Text.assemble((name, "cyan"), (f" does not fit this recipe: {why}", "dim")))


def _print(console: Console, title: str, rows: list[tuple[str, str, str]]) -> None:
    """Print what there is of one kind: names, what they are, and their options."""
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(ratio=2)
    if any(options for _, _, options in rows):
        table.add_column(style="dim", ratio=1)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row[: len(table.columns)]))
    console.print(Text(title, "bold"))
    console.print(table)
    console.print()


def families() -> dict[str, type[Part]]:
    """Return every family that has been defined, by name."""
    from fedloom import recipe  # noqa: F401 - defines and registers them
    from fedloom.parts import Part

    found: dict[str, type[Part]] = {}
    pending = [Part]
    while pending:
        for part in pending.pop().__subclasses__():
            pending.append(part)
            if part.is_family:
                found[part.family_name] = part
    return dict(sorted(found.items()))
