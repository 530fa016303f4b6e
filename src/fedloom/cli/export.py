"""`fedloom export`: a run's adapter as a PEFT folder, a merged model, or a hub repository."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.options import Checkpoint, Debug, Imports, Run, told


class Target(StrEnum):
    """Forms of an export."""

    adapter = "adapter"
    merged = "merged"
    hub = "hub"


def export(
    run: Run,
    to: Annotated[
        Target, typer.Option(help="PEFT folder, plain model folder, or upload of the PEFT folder.")
    ] = Target.adapter,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to write; by default RUN/export-FORM.")] = None,
    checkpoint: Checkpoint = None,
    client: Annotated[str | None, typer.Option(metavar="NAME", help="Export this client's personal adapter.")] = None,
    repo: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Hub repository for --to hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the hub repository private.")] = False,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Write a run's result in a form that other tools load, with a model card.

    [bold]Examples[/]

    fedloom export runs/demo

    fedloom export runs/demo --to merged --out demo-model

    fedloom export runs/demo --to hub --repo me/demo-lora
    """
    from fedloom import exporting
    from fedloom.types import RecipeError

    if to is Target.hub and repo is None:
        raise RecipeError("--to hub needs --repo USER/NAME")
    folder = out or run / f"export-{to}"
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"{folder} exists and is not empty; choose another with --out DIR, or remove it")
    if to is Target.merged:
        exporting.merged(run, folder, checkpoint, client, told)
    else:
        exporting.adapter(run, folder, checkpoint, client, told)
    if to is Target.hub:
        typer.echo(exporting.upload(folder, str(repo), private))
    else:
        typer.echo(f"written to {folder}")
