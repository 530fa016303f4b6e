"""`fedloom doctor`: what this machine has, what is missing, and the command that supplies it."""

from __future__ import annotations

import typer

from fedloom.cli.options import Debug

MARKS = {"ok": "[green]ok[/]", "warn": "[yellow]note[/]", "missing": "[yellow]missing[/]"}
NEEDED = ("python", "fedloom", "torch", "transformers", "peft")
INCOMPLETE = 2


def doctor(debug: Debug = False) -> None:
    """Check Python, libraries, CPU, GPU, hub, cache, disk and extras.

    What is missing need not matter: runs on the CPU need no GPU, and the bundled model no hub.

    [bold]Example[/]

    fedloom doctor
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fedloom.doctor import checks

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("to supply it", overflow="fold", style="cyan")
    found = checks()
    for check in found:
        table.add_row(check.name, MARKS[check.state], Text(check.detail), Text(check.fix))
    Console().print(table)
    if lost := [check.name for check in found if check.name in NEEDED and check.state == "missing"]:
        typer.echo(f"nothing can run without {', '.join(lost)}", err=True)
        raise SystemExit(INCOMPLETE)
    typer.echo("Only CPU devices are tested; the CUDA and MPS paths are written but untested.")
