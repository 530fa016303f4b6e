"""The `fedloom` command: its verbs, and how errors become messages and exit statuses."""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

from fedloom import __version__, allocator
from fedloom.cli.bench import bench
from fedloom.cli.chat import chat
from fedloom.cli.data import data
from fedloom.cli.doctor import doctor
from fedloom.cli.evaluate import evaluate
from fedloom.cli.export import export
from fedloom.cli.import_ import import_
from fedloom.cli.report import report
from fedloom.cli.run import run
from fedloom.cli.score import score
from fedloom.cli.show import list_parts, show

INTERNAL = 1
TELLING = {"-h", "--help", "--version", "--install-completion", "--show-completion"}
"""Options with which a command computes nothing, so that no time is spent on a better allocator."""

app = typer.Typer(
    name="fedloom",
    help="Fine-tune large language models on data that never leaves its owners.",
    epilog="First steps: [bold]fedloom doctor[/], then [bold]fedloom run demo[/].",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    suggest_commands=False,  # click does that
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fedloom {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune large language models on data that never leaves its owners."""


app.command(no_args_is_help=True)(run)
app.command(no_args_is_help=True)(show)
app.command("list")(list_parts)
app.command(no_args_is_help=True)(data)
app.command(no_args_is_help=True)(bench)
app.command("import", no_args_is_help=True)(import_)
app.command("eval", no_args_is_help=True)(evaluate)
app.command(no_args_is_help=True)(chat)
app.command(no_args_is_help=True)(export)
app.command(no_args_is_help=True)(score)
app.command(no_args_is_help=True)(report)
app.command()(doctor)


def main() -> None:
    """Run the command; errors that are meant for people are printed without a traceback (`--debug` shows it)."""
    debug = "--debug" in sys.argv
    try:
        if sys.argv[1:] and not TELLING & set(sys.argv) and "_FEDLOOM_COMPLETE" not in os.environ:
            allocator.ensure()  # first thing, since it may start the command again
        app()
    except BrokenPipeError:
        # whoever read the output has left; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(INTERNAL) from None
    except Exception as error:
        from fedloom.types import FedloomError  # imports torch, which takes a second or two

        if debug:
            raise
        if isinstance(error, FedloomError):
            _fail(str(error), error.exit_status)
        message = f"internal error: {type(error).__name__}: {error}\nrun the same command with --debug to see where"
        _fail(message, INTERNAL)


def _fail(message: str, status: int) -> NoReturn:
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(message, err=True)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
