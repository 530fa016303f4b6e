"""FedIT-U2S (arXiv 2409.07136): clients turn raw texts into instruction pairs with the model itself, and train on them.

    client k:  at its first round, for each of its texts x:
                   the exemplars nearest to x (cosine of embeddings) and x make a prompt
                   the base model writes an instruction and its answer, which are parsed and filtered
               trains on the pairs that passed, and on nothing else, from w^t
    server:    FedAvg,  p_k = pairs_k / sum_j pairs_j

A client's row is taken as one text: question and answer, one below the other. Exemplars are pairs that everybody may
see: those of the recipe, or public rows of the server, whose answers stand for their texts. A pair passes if both sides
have enough words and its instruction is not near (ROUGE-L) to one that passed before. A client with no pair sends a
change of zero with weight zero.

On the wire: down the exemplars' texts with a client's first message, where they are the server's; else as FedAvg. Texts
and pairs stay in the client's memory.

Differs from the paper in: the model that is tuned writes the pairs, where the paper asks a larger one too; one pair a
text; embeddings are the base model's mean last hidden states.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from fedloom import tensors
from fedloom.algorithms.base import Client, Server
from fedloom.algorithms.coverage import units
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.pairs import packed, unpacked
from fedloom.data.similar import rouge_l
from fedloom.parts import Record
from fedloom.types import (
    ClientUpdate,
    Embed,
    Generate,
    Memory,
    Message,
    Pair,
    ServerState,
    Steps,
    Tensors,
    Texts,
)

if TYPE_CHECKING:
    from fedloom.recipe import Recipe

EXEMPLARS, PAIRS = "exemplars", "pairs"
"""Slot and group of the server's exemplars; group of a client's memory with its pairs."""
TASK = "Read the last text and write one instruction about it, and its answer."
_WRITTEN = re.compile(
    r"\s*(?:Instruction:)?\s*(?P<question>\S.*?)\s*\n\s*Answer:\s*(?P<answer>\S.*?)\s*(?:\n\s*(?:Text|Instruction):.*)?\Z",
    re.DOTALL,
)


class Exemplar(Record):
    """A text with the instruction and the answer that one would write about it."""

    text: str = Field(min_length=1)
    """The raw text."""
    instruction: str = Field(min_length=1)
    """What is asked about it."""
    answer: str = Field(min_length=1)
    """What is to be answered."""


class FedItU2s(FedAvg, name="fedit-u2s"):
    """FedAvg on instruction pairs that the model writes about the clients' raw texts."""

    tells_missed: ClassVar[bool] = True

    exemplars: tuple[Exemplar, ...] = ()
    """What is shown to the model; none: public rows of the server."""
    sent: PositiveInt = 32
    """Public rows, the first ones, that are sent as exemplars where the recipe has none."""
    shots: PositiveInt = 3
    """Exemplars in a prompt."""
    max_new_tokens: PositiveInt = 128
    """Longest instruction and answer together."""
    temperature: NonNegativeFloat = 0.7
    """Of what the model writes; 0: its likeliest tokens."""
    min_words: PositiveInt = 2
    """Shortest instruction; an answer has one word at least."""
    overlap: Annotated[float, Field(gt=0, le=1)] = 0.7
    """ROUGE-L to an instruction that passed before, from which on one is left out."""

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        if not self.exemplars and not recipe.data.public:
            yield (
                "algorithm=fedit-u2s shows the model exemplars, and has none; set data.public to a number of rows, "
                "such as 32, or algorithm.exemplars"
            )

    def prepare(self, server: Server, state: ServerState) -> Steps[ServerState]:
        if self.exemplars or EXEMPLARS in state.slots:
            return state
        public: Sequence[Pair] = yield Texts()
        return replace(state, slots={**state.slots, EXEMPLARS: packed(public[: self.sent])})

    def broadcast(self, server: Server, state: ServerState, client: str) -> Message:
        groups = dict(super().broadcast(server, state, client).groups)
        if EXEMPLARS in state.slots and client not in state.seen:
            groups[EXEMPLARS] = state.slots[EXEMPLARS]
        return Message(groups)

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        start, pairs = message.groups["params"].tensors, (yield from self._pairs(client, message))
        fitted = yield from client.fit(start, **_alone(client, pairs))
        update = client.update(tensors.sub(fitted.params, start), fitted)
        weight = self.weight(len(pairs)) if pairs else 0.0
        memory = client.memory if PAIRS in client.memory else {**client.memory, PAIRS: packed(pairs)}
        return replace(update, weight=weight, metrics={**update.metrics, "pairs": float(len(pairs))}), memory

    def adapt(self, client: Client, message: Message, steps: int) -> Steps[Tensors]:
        pairs = yield from self._pairs(client, message)
        fitted = yield from client.fit(message.groups["params"].tensors, steps=range(steps), **_alone(client, pairs))
        return fitted.params

    def written(self, shown: Sequence[Exemplar]) -> Steps[tuple[Pair, ...]]:
        """Return the pairs that the model writes about the training rows of whoever asks."""
        rows: Sequence[Pair] = yield Texts("train")
        texts = [f"{row.question}\n{row.answer}".strip() for row in rows]
        own: Tensor = yield Embed(None, prompts=texts, pool="mean")
        stock: Tensor = yield Embed(None, prompts=[one.text for one in shown], pool="mean")
        near = torch.argsort(units(own) @ units(stock).mT, dim=1, descending=True, stable=True)[:, : self.shots]
        # the nearest one stands next to the text
        chosen = zip(texts, near.tolist(), strict=True)
        prompts = [prompt(text, [shown[i] for i in reversed(few)]) for text, few in chosen]
        outputs: Sequence[str] = yield Generate(
            None, prompts, self.max_new_tokens, questions=True, temperature=self.temperature, purpose="u2s"
        )
        return self.passed(outputs)

    def passed(self, outputs: Iterable[str]) -> tuple[Pair, ...]:
        """Return the pairs of what the model wrote that pass the filter, in their order."""
        passed: list[Pair] = []
        for pair in filter(None, map(parsed, outputs)):
            new = all(rouge_l(pair.question, other.question) < self.overlap for other in passed)
            if new and len(pair.question.split()) >= self.min_words:
                passed.append(pair)
        return tuple(passed)

    def _pairs(self, client: Client, message: Message) -> Steps[tuple[Pair, ...]]:
        """Return the pairs that a client wrote, or writes now."""
        if PAIRS in client.memory:
            return unpacked(client.memory[PAIRS])
        return (yield from self.written(self._shown(message)))

    def _shown(self, message: Message) -> Sequence[Exemplar]:
        if self.exemplars:
            return self.exemplars
        pairs = unpacked(message.groups[EXEMPLARS])
        # a row without a question or an answer shows nothing
        return [
            Exemplar(text=pair.answer, instruction=pair.question, answer=pair.answer)
            for pair in pairs
            if pair.question and pair.answer
        ]


def _alone(client: Client, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return the fields of a fit on pairs and no row."""
    return {"pairs": pairs, "rows": torch.arange(client.examples, client.examples + len(pairs))}


def prompt(text: str, shown: Iterable[Exemplar]) -> str:
    """Return what the model is asked: exemplars, then the text whose instruction and answer are missing."""
    shots = [f"Text: {one.text}\nInstruction: {one.instruction}\nAnswer: {one.answer}" for one in shown]
    return "\n\n".join([TASK, *shots, f"Text: {text}\nInstruction:"])


def parsed(output: str) -> Pair | None:
    """Return the instruction and the answer that the model wrote; None: it did not keep to the form."""
    found = _WRITTEN.match(output)
    return Pair(found["question"], found["answer"]) if found else None
