"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a YAML file.")]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe by dotted path, such as trainer.lr=1e-3."),
]
SetFiles = Annotated[
    list[str] | None,
    typer.Option("--set-file", metavar="NAME|FILE", help="Keys to lay over the recipe; may be given again."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Checkpoint = Annotated[
    str | None, typer.Option(metavar="latest|best|ROUND", help="A checkpoint in the place of the finished adapter.")
]
