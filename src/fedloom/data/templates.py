"""Templates: how a dialogue becomes text, and which of it is trained: every assistant turn and its end token.

A template returns spans, so that the mask cannot drift from the text. An assistant turn is two trained spans, its text
and its end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from fedloom.data.rows import Turn
from fedloom.parts import Part
from fedloom.types import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of the training text.

    Attributes:
        text: the piece.
        train: whether its tokens are labels.
    """

    text: str
    train: bool


def with_system(turns: Sequence[Turn], system: str | None) -> tuple[Turn, ...]:
    """Put a system prompt first, unless there is none or the dialogue begins with one of its own."""
    if not system or (turns and turns[0].role == "system"):
        return tuple(turns)
    return (Turn("system", system), *turns)


class Template(Part, family=True):
    """How a dialogue becomes text."""

    def render(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[Span]:
        """Return the spans of a dialogue; joined, they are the whole training text.

        Args:
            turns: the dialogue, system turn included.
            tokenizer: of the model to be trained.

        Raises:
            DataError: the template cannot express the dialogue.
            ModelError: the tokenizer lacks what the template needs.
        """
        raise NotImplementedError

    def prompt(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the text up to where the assistant would answer next; arguments and errors as for `render`."""
        raise NotImplementedError


class Chat(Template, name="chat"):
    """The tokenizer's own chat template."""

    def render(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[Span]:
        """Render ever longer beginnings of the dialogue; see `Template.render`."""
        whole = _chat(turns, tokenizer, ask=False)
        spans: list[Span] = []
        done = 0
        for i in (i for i, turn in enumerate(turns) if turn.role == "assistant"):
            last = i + 1 == len(turns)
            before = len(_prefix(_chat(turns[:i], tokenizer, ask=True), whole))
            after = len(whole if last else _prefix(_chat(turns[: i + 1], tokenizer, ask=False), whole))
            spans += [Span(whole[done:before], False), *_answer(whole[before:after], tokenizer)]
            done = after
        return [*spans, Span(whole[done:], False)]

    def prompt(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> str:
        """Render with the header of the assistant's next turn; see `Template.prompt`."""
        return _chat(turns, tokenizer, ask=True)


def _chat(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, ask: bool) -> str:
    if tokenizer.chat_template is None:
        raise DataError("data.template=chat: this tokenizer has no chat template; use data.template=alpaca or plain")
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _UNDATED + template
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=ask
        )
    except TemplateError as error:
        roles = ", ".join(turn.role for turn in turns)
        hint = "; it may know no system turn: leave data.system unset" if "system" in roles else ""
        raise DataError(
            f"data.template=chat: the tokenizer's chat template refuses the turns {roles} ({error}){hint},"
            " or use data.template=alpaca or plain"
        ) from error
    return str(text)


# Some templates print today's date, but a run that is resumed tomorrow must train on the same text.
_UNDATED = "{%- macro strftime_now(form) -%}26 Jul 2024{%- endmacro %}"


def _prefix(beginning: str, whole: str) -> str:
    if whole.startswith(beginning):
        return beginning
    at = next((i for i, (a, b) in enumerate(zip(beginning, whole, strict=False)) if a != b), len(whole))
    raise DataError(
        "data.template=chat: the tokenizer's chat template changes earlier text when turns are added, so the"
        f" assistant's text cannot be told apart (…{beginning[max(0, at - 20) : at + 20]!r} becomes"
        f" …{whole[max(0, at - 20) : at + 20]!r}); use data.template=alpaca or plain"
    )


def _answer(text: str, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """Split an assistant turn into its text, its end token, and white space that a model need not write."""
    body = text.rstrip()
    end = max((token for token in tokenizer.get_added_vocab() if body.endswith(token)), key=len, default="")
    if not end:
        raise DataError(
            "data.template=chat: the tokenizer's chat template ends the assistant's turn without an end token, so the"
            f" model would never learn to stop (…{text[-20:]!r}); use data.template=alpaca or plain"
        )
    return [Span(body.removesuffix(end), True), Span(end, True), Span(text[len(body) :], False)]


class _Marked(Template):
    """Text with markers; begins with bos where the tokenizer itself adds one, and ends each answer with eos."""

    def opening(self, system: str) -> str:
        """Return the text before the first user turn."""
        raise NotImplementedError

    def question(self, turn: Turn) -> str:
        """Return a user turn, up to where the answer begins."""
        raise NotImplementedError

    def render(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[Span]:
        """Join the turns by markers; see `Template.render`."""
        if tokenizer.eos_token is None:
            raise ModelError(f"data.template={self.part_name}: the tokenizer has no end token (eos) to end an answer")
        system = "\n\n".join(turn.text for turn in turns if turn.role == "system")
        spans = [Span(bos(tokenizer) + self.opening(system), False)]
        for turn in turns:
            if turn.role == "assistant":
                spans += [Span(turn.text, True), Span(tokenizer.eos_token, True), Span("\n\n", False)]
            elif turn.role == "user":
                spans.append(Span(self.question(turn), False))
        return spans[:-1] if turns and turns[-1].role == "assistant" else spans

    def prompt(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> str:
        """Join the turns that are there; see `Template.prompt`."""
        return "".join(span.text for span in self.render(turns, tokenizer))


def bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of bos if the tokenizer begins every text with it."""
    first = tokenizer("").input_ids[:1]
    return str(tokenizer.bos_token) if first and first[0] == tokenizer.bos_token_id else ""


class Alpaca(_Marked, name="alpaca"):
    """The markers of Stanford Alpaca, for base models: an instruction, its input where it has one, a response."""

    def opening(self, system: str) -> str:
        """Return the system prompt, or a sentence that explains the markers."""
        return (system or "Follow the instruction; where there is an input, it belongs to the instruction.") + "\n\n"

    def question(self, turn: Turn) -> str:
        """Set instruction and input apart."""
        given = f"### Input:\n{turn.input}\n\n" if turn.input else ""
        instruction = turn.text.removesuffix(f"\n\n{turn.input}") if turn.input else turn.text
        return f"### Instruction:\n{instruction}\n\n{given}### Response:\n"


class Plain(_Marked, name="plain"):
    """As few markers as can be: who speaks, on a line of its own."""

    def opening(self, system: str) -> str:
        """Return the system prompt, if there is one."""
        return f"{system}\n\n" if system else ""

    def question(self, turn: Turn) -> str:
        """Name the speakers."""
        return f"User:\n{turn.text}\n\nAssistant:\n"
