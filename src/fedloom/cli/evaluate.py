"""`fedloom eval`: measure a run's adapter again, or by other evaluators."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fedloom.cli.options import Adapter, Checkpoint, Debug, Imports, Run


def evaluate(
    run: Run,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[evaluate=...]", help="Evaluators in the place of the recipe's.")
    ] = None,
    checkpoint: Checkpoint = None,
    adapter: Adapter = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
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

    from fedloom.console import ConsoleSink
    from fedloom.reevaluate import reevaluate
    from fedloom.results import results
    from fedloom.types import RecipeError

    if checkpoint is not None and adapter is not None:
        raise RecipeError("--checkpoint and --adapter both name what to measure; leave out one of them")
    with ConsoleSink(Console(stderr=True), quiet=as_json) as sink:
        metrics, intervals = reevaluate(run, settings or [], checkpoint, adapter, sink)
    if as_json:
        typer.echo(json.dumps(metrics, indent=1))
    else:
        console = Console()
        console.print(results(metrics))
        for line in intervals:
            console.print(line, style="dim", markup=False, highlight=False)
