"""`fedloom chat`: talk to a run's model, or to a bare one."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.options import Adapter, Checkpoint, Debug, Imports, told

if TYPE_CHECKING:
    from fedloom.client.models import Loaded
    from fedloom.data.templates import Template


def chat(
    what: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder, or a model.")],
    prompt: Annotated[str | None, typer.Option(help="Ask this once, print the answer, and end.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt; by default the run's.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the most likely words.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    adapter: Adapter = None,
    checkpoint: Checkpoint = None,
    client: Annotated[str | None, typer.Option(metavar="NAME", help="Use this client's personal adapter.")] = None,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Talk to a run's adapter with its own template and system prompt; Ctrl-D ends.

    [bold]Examples[/]

    fedloom chat runs/demo

    fedloom chat runs/demo --prompt "Sort these numbers: 5, 2, 9."

    fedloom chat smollm2-135m --adapter runs/demo/adapter
    """
    from rich.console import Console

    with Console(stderr=True).status("loading the model"):
        speak = _open(what, adapter, checkpoint, client, (system, temperature, max_new_tokens))
    if prompt is None:
        _talk(speak)
    else:
        speak.say([prompt])


def _open(
    what: str,
    adapter: Path | None,
    checkpoint: str | None,
    client: str | None,
    style: tuple[str | None, float, int],
) -> _Speaker:
    """Load what to talk to; `style` is the system prompt or None, the temperature, and the longest answer."""
    from fedloom.client.models import Model
    from fedloom.data.templates import Chat
    from fedloom.reopen import load, read_recipe, reopen
    from fedloom.types import RecipeError

    recipe = read_recipe(Path(what)) if (Path(what) / "recipe.yaml").is_file() else None
    if (checkpoint or client) and (adapter or recipe is None):
        raise RecipeError("--checkpoint and --client choose among a run's own adapters; leave them out here")
    if recipe is None and Path(what).is_dir() and not (Path(what) / "config.json").is_file():
        raise RecipeError(f"{what} is neither a run folder (no recipe.yaml in it) nor a model's (no config.json)")
    if recipe is not None and adapter is None:
        opened = reopen(Path(what), checkpoint, client, told)
        loaded, label = opened.loaded, opened.label
    else:
        loaded = load(recipe.model if recipe else Model(name=what), adapter, told)
        label = str(adapter or "no adapter")
    system, temperature, longest = style
    if recipe is None:
        return _Speaker(f"{what}, {label}", loaded, Chat(), system, temperature, longest)
    system = recipe.data.system if system is None else system
    return _Speaker(f"{what}, {label}", loaded, recipe.data.template, system, temperature, longest)


def _talk(speak: _Speaker) -> None:
    """Answer line by line, with all that was said before, until the input ends."""
    typer.secho(f"{speak.label}; Ctrl-D ends", dim=True, err=True)
    said: list[str] = []
    while True:
        typer.secho("you> ", bold=True, nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            typer.echo(err=True)
            return
        if line.strip():
            said.append(line.strip())
            said.append(speak.say(said))


@dataclass(frozen=True, slots=True)
class _Speaker:
    """A model that goes on with a dialogue."""

    label: str
    loaded: Loaded
    template: Template
    system: str | None
    temperature: float
    max_new_tokens: int

    def say(self, said: list[str]) -> str:
        """Print and return what comes next; `said` is what the user and the model said in turn."""
        from fedloom.client.generate import sample
        from fedloom.data.rows import Turn
        from fedloom.data.templates import with_system

        turns = [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(said)]
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        text = self.template.prompt(with_system(turns, self.system), tokenizer)
        answer = ""
        for piece in sample(model, tokenizer, text, self.max_new_tokens, self.temperature, 1.0, len(said)):
            typer.echo(piece, nl=False)
            sys.stdout.flush()
            answer += piece
        typer.echo()
        return answer
