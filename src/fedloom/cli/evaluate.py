"""`fedloom eval`: measure a run's adapter again, or by other evaluators."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.options import NOT_RUN, Adapter, Checkpoint, Debug, Imports, UnsafeExecution, without_sandbox


def evaluate(
    what: Annotated[str, typer.Argument(metavar="RUN|ADAPTER|MODEL", help="A run folder, a PEFT folder, or a model.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="evaluate=...: evaluators in the place of the recipe's. Without a run also how the model is loaded "
            "and how prompts are written, such as model.dtype or data.template.",
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    adapter: Adapter = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep samples and results in a new folder.", file_okay=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
    unsafe_execution: UnsafeExecution = False,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Measure a run's result, an adapter or a model, and the base beside it, on test data.

    A missing adapter is an error, and so is one of another base model. What is no run has no evaluators of its own,
    so they must be named.

    [bold]Examples[/]

    fedloom eval runs/demo

    fedloom eval runs/demo --checkpoint best

    fedloom eval runs/demo 'evaluate=[{name: gsm8k, limit: 50}]'

    fedloom eval my-adapter 'evaluate=[{name: mmlu, limit: 100}]' --out results

    fedloom eval my-model 'evaluate=[gsm8k]' data.template=alpaca model.dtype=bf16
    """
    from rich.console import Console

    from fedloom.console import ConsoleSink
    from fedloom.outcome import finite
    from fedloom.reevaluate import reevaluate, target
    from fedloom.results import not_run, results
    from fedloom.types import RecipeError

    if checkpoint is not None and adapter is not None:
        raise RecipeError("--checkpoint and --adapter both name what to measure; leave out one of them")
    words = settings or []
    chosen = target(what, words, checkpoint, adapter)
    if unsafe_execution:
        chosen = target(what, [*words, *without_sandbox(chosen.recipe)], checkpoint, adapter)
    with ConsoleSink(Console(stderr=True), quiet=as_json) as sink:
        found = reevaluate(chosen, sink, out)
    if as_json:
        typer.echo(json.dumps(finite(found.metrics), indent=1, allow_nan=False))
    else:
        console = Console()
        console.print(results(found.metrics))
        for line in found.intervals:
            console.print(line, style="dim", markup=False, highlight=False)
        for line in not_run(found.not_run):
            console.print(line, style="yellow", markup=False, highlight=False)
    if found.not_run:
        if out is None:
            typer.echo("--out DIR keeps what was not run; fedloom score DIR runs it where it can be run", err=True)
        raise SystemExit(NOT_RUN)
