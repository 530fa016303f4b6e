"""`fedloom run`: run a recipe, or go on with a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.options import Debug, Imports, SetFiles


def run(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="A shipped recipe or YAML file, then keys to set."),
    ] = None,
    set_file: SetFiles = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with this run folder.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run folder; by default runs/RECIPE.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run folder that is there.")] = False,
    imports: Imports = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and the result only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json's content on stdout.")] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model across clients, as a recipe says.

    [bold]Examples[/]

    fedloom run demo

    fedloom run demo rounds=3 algorithm=fedprox algorithm.mu=0.1 --out runs/prox

    fedloom run fed-gsm8k-3 --set-file fed-gsm8k-3_tiny

    fedloom run --resume runs/demo rounds=+10
    """
    from rich.console import Console

    from fedloom import loop
    from fedloom.console import ConsoleSink
    from fedloom.results import report
    from fedloom.types import RecipeError

    words = words or []
    sink = ConsoleSink(Console(stderr=True), quiet)
    folder = resume
    if resume is not None and (odd := [word for word in words if "=" not in word]):
        raise RecipeError(f"with --resume every word is key=value; got {odd[0]!r} (the run's own recipe is used)")
    if resume is None and (not words or "=" in words[0]):
        raise RecipeError("name a recipe first, such as demo (fedloom list shows them), or use --resume RUN")
    try:
        if resume is not None:
            result = loop.resume(resume, words, sink)
        else:
            folder = out if out is not None else Path("runs") / Path(words[0]).stem
            result = loop.run(
                words[0], *words[1:], out=folder, overwrite=overwrite, set_files=set_file or (), sink=sink
            )
    except KeyboardInterrupt:
        if debug:
            raise
        typer.echo(f"\ninterrupted; the state is saved. Go on with: fedloom run --resume {folder}", err=True)
        raise SystemExit(130) from None
    if as_json:
        typer.echo(json.dumps(result.summary, indent=1, ensure_ascii=False))
    else:
        report(Console(), result.folder, result.summary)
