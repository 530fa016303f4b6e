"""`fedloom run`: run a recipe, or go on with a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.options import NOT_RUN, Debug, Imports, SetFiles, UnsafeExecution, without_sandbox

if TYPE_CHECKING:
    from fedloom.loop import Result

INTERRUPTED = 130


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
    unsafe_execution: UnsafeExecution = False,
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

    words = words or []
    if resume is None:
        _check_start(words)
        folder = out or Path("runs") / Path(words[0]).stem
    else:
        _check_resume(words, {"--set-file": set_file, "--out": out, "--overwrite": overwrite})
        folder = resume
    if unsafe_execution:
        words = [*words, *_unsafe(words, resume, set_file or ())]
    sink = ConsoleSink(Console(stderr=True), quiet)
    with _interruptible(folder):
        if resume is None:
            result = loop.run(
                words[0], *words[1:], out=folder, overwrite=overwrite, set_files=set_file or (), sink=sink
            )
        else:
            result = loop.resume(folder, words, sink)
    _tell(result, as_json)
    if result.summary.get("not_run"):
        raise SystemExit(NOT_RUN)


def _unsafe(words: Sequence[str], resume: Path | None, set_files: Sequence[str]) -> list[str]:
    from fedloom import recipe as recipes

    if resume is None:
        return without_sandbox(recipes.load(words[0], words[1:], set_files))
    settings = [word for word in words if not word.startswith("rounds=+")]  # relative to the run, not to the recipe
    return without_sandbox(recipes.load(resume / "recipe.yaml", settings))


def _check_start(words: list[str]) -> None:
    from fedloom.types import RecipeError

    if not words or "=" in words[0]:
        raise RecipeError("name a recipe first, such as demo (fedloom list shows them), or use --resume RUN")


def _check_resume(words: list[str], options: Mapping[str, object]) -> None:
    """Refuse what means nothing for a run that has its recipe and its folder."""
    from fedloom.types import RecipeError

    if odd := [word for word in words if "=" not in word]:
        raise RecipeError(f"with --resume every word is key=value; got {odd[0]!r} (the run's own recipe is used)")
    if odd := [name for name, value in options.items() if value]:
        raise RecipeError(f"{odd[0]} cannot go with --resume, which goes on with the run's own recipe in its folder")


@contextmanager
def _interruptible(folder: Path) -> Iterator[None]:
    """Turn Ctrl-C into a line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        begun = (folder / "checkpoints" / "latest").exists()
        go_on = f"the state is saved. Go on with: fedloom run --resume {folder}"
        how = go_on if begun else "nothing was trained yet; start it again"
        typer.echo(f"\ninterrupted; {how}", err=True)
        raise SystemExit(INTERRUPTED) from None


def _tell(result: Result, as_json: bool) -> None:
    from rich.console import Console

    from fedloom.results import report

    if as_json:
        typer.echo(json.dumps(result.summary, indent=1, ensure_ascii=False))
    else:
        report(Console(), result.folder, result.summary)
