"""`fedloom show` and `fedloom list`: what there is, and what a recipe says once it is resolved."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.options import Debug, Imports, SetFiles, Settings

if TYPE_CHECKING:
    from fedloom.parts import Part


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
    from rich.syntax import Syntax

    from fedloom import recipe as recipes
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
    if console.is_terminal:
        console.print(Syntax(loaded.to_yaml(), "yaml", background_color="default", word_wrap=True))
    else:
        typer.echo(loaded.to_yaml(), nl=False)
    if is_run and (folder / "summary.json").is_file():
        console.print(results(json.loads((folder / "summary.json").read_text(encoding="utf-8"))["metrics"]))


def list_parts(
    family: Annotated[str | None, typer.Argument(metavar="[FAMILY]", help="One family, such as algorithm.")] = None,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """List the shipped recipes and every part by family.

    [bold]Examples[/]

    fedloom list

    fedloom list algorithm
    """
    from rich.console import Console
    from rich.table import Table

    from fedloom import recipe as recipes
    from fedloom.types import RecipeError, suggest

    console, found = Console(), families()
    if family is not None and family not in found:
        raise RecipeError(f"there is no family {family!r}{suggest(family, found)}; families: {', '.join(found)}")
    if family is None:
        table = Table("recipe", "what it is", title="shipped recipes", title_justify="left")
        for name, text in recipes.shipped().items():
            table.add_row(name, text.splitlines()[0].lstrip("# "))
        console.print(table)
    for name in [family] if family else found:
        if not found[name].known:
            continue
        table = Table(name, "what it is", "options", title=name, title_justify="left", show_header=False)
        for part_name, part in sorted(found[name].known.items()):
            summary = (inspect.getdoc(part) or "").splitlines()[0]
            table.add_row(part_name, summary, ", ".join(part.model_fields))
        console.print(table)


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
