"""`fedloom eval`: measure a run's adapter again, or by other evaluators."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fedloom.cli.options import NOT_RUN, Adapter, Checkpoint, Debug, Imports, Run, UnsafeExecution, without_sandbox


def evaluate(
    run: Run,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[evaluate=...]", help="Evaluators in the place of the recipe's.")
    ] = None,
    checkpoint: Checkpoint = None,
    adapter: Adapter = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
    unsafe_execution: UnsafeExecution = False,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Measure the base and a run's result on test data; a missing adapter is an error.

    [bold]Examples[/]

    fedloom eval runs/demo

    fedloom eval runs/demo --checkpoint best

    fedloom eval runs/demo 'evaluate=[{name: gsm8k, limit: 50}]'
    """
    from rich.console import Console

    from fedloom import recipe as recipes
    from fedloom.console import ConsoleSink
    from fedloom.reevaluate import reevaluate
    from fedloom.reopen import read_recipe
    from fedloom.results import not_run, results
    from fedloom.types import RecipeError

    if checkpoint is not None and adapter is not None:
        raise RecipeError("--checkpoint and --adapter both name what to measure; leave out one of them")
    words = settings or []
    if unsafe_execution:
        words = [*words, *without_sandbox(recipes.load(read_recipe(run).dump(), words))]
    with ConsoleSink(Console(stderr=True), quiet=as_json) as sink:
        found = reevaluate(run, words, checkpoint, adapter, sink)
    if as_json:
        typer.echo(json.dumps(found.metrics, indent=1))
    else:
        console = Console()
        console.print(results(found.metrics))
        for line in found.intervals:
            console.print(line, style="dim", markup=False, highlight=False)
        for line in not_run(found.not_run):
            console.print(line, style="yellow", markup=False, highlight=False)
    if found.not_run:
        raise SystemExit(NOT_RUN)
