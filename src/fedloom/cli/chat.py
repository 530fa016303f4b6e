"""`fedloom chat`: talk to a run's model, or to a bare one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.options import Adapter, Checkpoint, Debug, Imports

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from fedloom.data.rows import Turn
    from fedloom.data.templates import Template


def chat(
    what: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run folder, or a model to talk to without adapter.")
    ],
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

    fedloom chat smollm2-135m
    """
    from fedloom.client.models import Model
    from fedloom.data.rows import Turn
    from fedloom.data.templates import Chat
    from fedloom.reopen import load, read_recipe, reopen
    from fedloom.types import RecipeError

    is_run = (Path(what) / "recipe.yaml").is_file()
    if (checkpoint or client) and (adapter or not is_run):
        raise RecipeError("--checkpoint and --client choose among a run's own adapters; leave them out here")
    recipe = read_recipe(Path(what)) if is_run else None
    if recipe is not None and adapter is None:
        opened = reopen(Path(what), checkpoint, client)
        loaded, label = opened.loaded, opened.label
    else:
        loaded = load(recipe.model if recipe else Model(name=what), adapter)
        label = str(adapter) if adapter else "no adapter"
    template: Template = recipe.data.template if recipe else Chat()
    if system is None and recipe is not None:
        system = recipe.data.system
    speak = _Speaker(loaded.model, loaded.tokenizer, template, system, temperature, max_new_tokens)
    if prompt is not None:
        for piece in speak([Turn("user", prompt)]):
            typer.echo(piece, nl=False)
        typer.echo()
        return
    typer.secho(f"{what}, {label}; Ctrl-D ends", dim=True, err=True)
    turns: list[Turn] = []
    while True:
        typer.secho("you> ", bold=True, nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            typer.echo(err=True)
            return
        turns.append(Turn("user", line.strip()))
        answer = ""
        for piece in speak(turns):
            typer.echo(piece, nl=False)
            sys.stdout.flush()
            answer += piece
        typer.echo()
        turns.append(Turn("assistant", answer))


class _Speaker:
    """Renders a dialogue and streams what the model says next."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        template: Template,
        system: str | None,
        temperature: float,
        max_new_tokens: int,
    ) -> None:
        self.model, self.tokenizer, self.template, self.system = model, tokenizer, template, system
        self.temperature, self.max_new_tokens = temperature, max_new_tokens

    def __call__(self, turns: list[Turn]) -> Iterator[str]:
        from fedloom.client.generate import sample
        from fedloom.data.templates import with_system

        text = self.template.prompt(with_system(turns, self.system), self.tokenizer)
        return iter(sample(self.model, self.tokenizer, text, self.max_new_tokens, self.temperature, 1.0, len(turns)))
