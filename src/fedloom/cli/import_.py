"""`fedloom import`: a recipe from a configuration of FS-LLM, FlowerTune or OpenFedLLM."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.options import Debug, Imports


def import_(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A YAML, pyproject.toml or shell script; - reads standard input.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write the recipe; by default standard output.")
    ] = None,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Write a recipe from another project's configuration, and name what could not be translated.

    [bold]Examples[/]

    fedloom import gsm_federate.yaml --out gsm.yaml

    fedloom import flowertune/pyproject.toml --out medical.yaml

    echo "--fed_alg fedprox --num_clients 20 ..." | fedloom import - --out prox.yaml
    """
    from fedloom.importing import convert
    from fedloom.types import RecipeError

    if out is not None and out.exists():
        raise RecipeError(f"{out} exists; choose another with --out FILE, or remove it")
    name = "standard input" if file == "-" else file
    found = convert(sys.stdin.read() if file == "-" else _text(Path(file)), name)
    for head, remarks in (("not translated", found.lost), ("differs", found.notes)):
        for remark in remarks:
            typer.echo(f"{head}: {remark}", err=True)
    text = found.to_yaml(name)
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")
        typer.echo(f"{found.format}: written to {out}; run it with: fedloom run {out}", err=True)


def _text(path: Path) -> str:
    from fedloom.types import RecipeError

    if path.is_dir():
        raise RecipeError(f"{path} is a folder; name a file in it, such as {path / 'pyproject.toml'}")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as text ({error})") from error
