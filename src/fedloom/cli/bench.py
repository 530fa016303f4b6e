"""`fedloom bench`: many runs as one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.options import Debug, Imports, SetFiles

if TYPE_CHECKING:
    from fedloom.bench import Outcome

INCOMPLETE = 4


def bench(
    words: Annotated[
        list[str], typer.Argument(metavar="RECIPE... [KEY=VALUE]...", help="Recipes, then keys to set in all of them.")
    ],
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary",
            metavar="KEY=VALUE,VALUE",
            help="Run with each of these values, or of [{KEY: VALUE, KEY: VALUE}, ...] sets; may be given again.",
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="N,N", help="Seeds, each a run of its own.")] = "0,1,2",
    set_file: SetFiles = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the runs and the tables go.")] = Path("runs/bench"),
    imports: Imports = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show the tables only.")] = False,
    debug: Debug = False,
) -> None:
    """Run recipes x variations x seeds and put them into one table; go on where an earlier call was stopped.

    With --set-file _tiny every recipe takes its own file of that ending, such as fed-gsm8k-3_tiny.

    Regimes (local, federated, centralized) come from the recipes' `compare`, at the token budget of `budget`.

    [bold]Examples[/]

    fedloom bench demo --vary algorithm=fedavg,fedprox,flora --seeds 0,1,2 server.lr=1

    fedloom bench fed-gsm8k-3 fed-dolly-meta --set-file _tiny --seeds 0
    """
    from rich.console import Console

    from fedloom.bench import grid, run_all, tabulate, write_page
    from fedloom.console import ConsoleSink
    from fedloom.types import RecipeError

    names, settings = [w for w in words if "=" not in w], [w for w in words if "=" in w]
    if not names:
        raise RecipeError("name at least one recipe, such as demo (fedloom list shows them)")
    if not all(part.strip().isdigit() for part in seeds.split(",")):
        raise RecipeError(f"--seeds {seeds!r}: allowed: whole numbers from 0, with commas between them, such as 0,1,2")
    cells = grid(names, settings, vary or (), [int(part) for part in seeds.split(",")], out)
    console = Console(stderr=True)

    def told(outcome: Outcome) -> None:
        place = cells.index(outcome.cell) + 1
        how = outcome.reason.partition("\n")[0] or "done"
        console.print(f"[{place}/{len(cells)}] {outcome.cell.folder}: {how}", markup=False, soft_wrap=True)

    outcomes = run_all(cells, set_file or (), lambda cell: ConsoleSink(console, quiet), told)
    found = tabulate(outcomes)
    several = {"--vary": vary, "--set-file": set_file, "--import": imports}
    options = [word for option, values in several.items() for value in values or () for word in (option, value)]
    command = shlex.join(["fedloom", "bench", *words, *options, "--seeds", seeds, "--out", str(out)])
    written = [*found.write(out), write_page(found, outcomes, command, out)]
    typer.echo(found.markdown(), nl=False)
    console.print(f"written: {', '.join(map(str, written))}", markup=False, soft_wrap=True)
    if found.missing:
        raise typer.Exit(INCOMPLETE)
