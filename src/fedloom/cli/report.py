"""`fedloom report`: draw a run, or several over each other, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.options import Debug

SEVERAL = Path("comparison.html")


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, finished or not.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help=f"The page; by default RUN/report.html, or {SEVERAL} for several runs.", dir_okay=False
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Draw a run as one self-contained page, or lay several runs over each other.

    Results of several runs are paired only where they answered the same items under the same evaluation settings.

    [bold]Examples[/]

    fedloom report runs/demo

    fedloom report runs/avg runs/prox --out prox.html
    """
    from fedloom.report import write_overlay, write_report

    if len(runs) == 1:
        typer.echo(write_report(runs[0], out))
        return
    page, refused = write_overlay(runs, out or SEVERAL)
    for why in refused:
        typer.secho("not paired: ", fg="yellow", nl=False, err=True)
        typer.echo(why, err=True)
    typer.echo(page)
