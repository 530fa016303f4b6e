"""Arguments and options that several verbs share."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedloom.recipe import Recipe as Loaded

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a YAML file.")]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe by dotted path, such as trainer.lr=1e-3."),
]
SetFiles = Annotated[
    list[str] | None,
    typer.Option("--set-file", metavar="NAME|FILE", help="Keys to lay over the recipe; may be given again."),
]


def _import(names: list[str] | None) -> list[str] | None:
    """Import modules by name, those of the current folder included, so that the parts in them are known."""
    if names:
        sys.path.insert(0, "")
    for name in names or ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            from fedloom.types import RecipeError  # imports torch, which takes a second or two

            raise RecipeError(
                f"--import {name}: {error}; the module must be installed, on PYTHONPATH or in this folder"
            ) from error
    return names


Imports = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", callback=_import, help="Import a module that registers parts first."),
]


def told(text: str) -> None:
    """Print a line for the person at the terminal, where it is no part of the result."""
    typer.echo(text, err=True)


NOT_RUN = 4
"""Status of a command that is done but for evaluators that could not be run."""


def without_sandbox(recipe: Loaded) -> list[str]:
    """Return the settings that let each code evaluator of a recipe run its programs as plain processes."""
    from fedloom.evaluate.code.base import CodeEvaluator
    from fedloom.types import RecipeError

    places = [i for i, one in enumerate(recipe.evaluate) if isinstance(one, CodeEvaluator)]
    if not places:
        raise RecipeError("--unsafe-execution: no evaluator of the recipe runs programs; leave it out")
    return [f"evaluate.{i}.unsafe_execution=true" for i in places]


UnsafeExecution = Annotated[
    bool,
    typer.Option(
        "--unsafe-execution", help="Run model-written programs without a sandbox: they can do whatever you can."
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Adapter = Annotated[
    Path | None, typer.Option(metavar="DIR", help="A PEFT folder in the place of the run's own adapter.")
]
Checkpoint = Annotated[
    str | None, typer.Option(metavar="latest|best|ROUND", help="A checkpoint in the place of the finished adapter.")
]
