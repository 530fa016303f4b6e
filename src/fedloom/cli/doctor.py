"""`fedloom doctor`: what this machine has, what is missing, and the command that supplies it."""

from __future__ import annotations

import typer

from fedloom.cli.options import Debug

MARKS = {"ok": "[green]ok[/]", "warn": "[yellow]note[/]", "missing": "[red]missing[/]"}


def doctor(debug: Debug = False) -> None:
    """Check Python, libraries, CPU, GPU, hub, cache, disk and extras.

    [bold]Example[/]

    fedloom doctor
    """
    from rich.console import Console
    from rich.table import Table

    from fedloom.doctor import checks

    table = Table(title="fedloom doctor", title_justify="left", header_style="bold")
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("to supply it", overflow="fold", style="cyan")
    found = checks()
    for check in found:
        table.add_row(check.name, MARKS[check.state], check.detail, check.fix)
    Console().print(table)
    typer.echo("Only CPU devices are tested; the CUDA and MPS paths are written but untested.")
