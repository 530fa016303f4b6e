"""What a client does in a round: which rows, in which steps, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from transformers import PreTrainedModel

from fedloom import seeds
from fedloom.client.attached import Attached
from fedloom.client.objectives import Objective
from fedloom.client.optimizers import AdamW, Constant, Optimizer, Schedule
from fedloom.data.encode import Encoded, Example
from fedloom.parts import Record


@dataclass(frozen=True, slots=True)
class Rows:
    """Some of the encoded examples, read when they are needed.

    Attributes:
        encoded: all examples.  indices: (n,) which of them.  weights: (n,) factors of their losses; None: ones.
    """

    encoded: Encoded
    indices: np.ndarray
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, row: int) -> Example:
        example = self.encoded.example(int(self.indices[row]))
        return example if self.weights is None else replace(example, weight=float(self.weights[row]))

    def lengths(self) -> list[int]:
        """Return the number of tokens of each row."""
        starts = self.encoded.starts
        return (starts[self.indices + 1] - starts[self.indices]).tolist()  # type: ignore[no-any-return]

    def labels(self) -> list[int]:
        """Return the number of trained tokens of each row."""
        starts = self.encoded.starts
        # nothing predicts the first token
        return [int(self.encoded.train[starts[i] + 1 : starts[i + 1]].sum()) for i in self.indices]

    def answer_bytes(self) -> int:
        """Return the UTF-8 bytes of all answers."""
        return int(self.encoded.answer_bytes[self.indices].sum())


class Trainer(Record):
    """The recipe's `trainer:` section: one client's local training within one round."""

    optimizer: Optimizer = AdamW()
    lr: PositiveFloat = 1e-3
    """Learning rate before the schedule."""
    steps: PositiveInt | None = 10
    """Optimiser steps a round."""
    epochs: PositiveInt | None = None
    """Passes over the client's rows a round, instead of `steps`."""
    tokens: PositiveInt | None = None
    """Input tokens a round, instead of `steps`: stops at the step that comes nearest."""
    batch: PositiveInt = 8
    """Rows of one batch."""
    accumulate: PositiveInt = 1
    """Batches whose gradients make one optimiser step; n batches equal one batch of n times the rows."""
    schedule: Schedule = Constant()
    decay: Annotated[float, Field(ge=0, le=1)] = 1.0
    """What the learning rate falls to within a round, as a factor: step k of K, from 0, takes 1 - (1 - decay) k/K of
    the round's; 1: constant (FedSWA, arXiv 2507.20016)."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest joint gradient norm of a step; null: no clipping."""
    micro_tokens: Annotated[int, Field(ge=1)] = 1024
    """Tokens of one forward pass, padding included: a step's rows are cut into passes of at most this size (at least
    one row)."""
    packing: bool | Literal["auto"] = "auto"
    """Rows side by side without padding, their common beginning computed once; auto: on CPUs, for models that can."""
    checkpointing: bool | Literal["auto"] = "auto"
    """Keep only what enters each decoder layer and compute the rest again when it is needed: less memory, a third more
    work; auto: where a pass would not fit otherwise."""

    @model_validator(mode="before")
    @classmethod
    def _one_length(cls, value: object) -> object:
        # `epochs` or `tokens` alone switches the default number of steps off
        if isinstance(value, dict) and (value.get("epochs") or value.get("tokens")) and "steps" not in value:
            return {**value, "steps": None}
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [n for n in ("steps", "epochs", "tokens") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"set exactly one of steps, epochs, tokens (set: {', '.join(given) or 'none'})")
        return self

    def rows_per_step(self, rows: int) -> int:
        """Return how many rows one optimiser step takes from a client with `rows` rows."""
        return min(self.batch * self.accumulate, rows)


@dataclass(frozen=True, slots=True)
class Bench:
    """Where a fit happens: the resident model with its adapter, and the names of the random streams.

    Attributes:
        schedule_rounds: the recipe's rounds, which the learning-rate schedule spans.
        reference: plain arithmetic, one client at a time, rows as they were drawn.
        on_step: told of every optimiser step: client, tokens, mean loss.
    """

    model: PreTrainedModel
    attached: Attached
    objective: Objective
    trainer: Trainer
    seed: int
    schedule_rounds: int
    reference: bool = False
    on_step: Callable[[str, int, float], None] = lambda client, tokens, loss: None

    def factor(self, round_: int) -> float:
        """Return the learning rate's factor in a round; after the last one, where no schedule rules, it is 1."""
        return self.trainer.schedule.factor(round_, self.schedule_rounds) if round_ < self.schedule_rounds else 1.0

    @property
    def packed(self) -> bool:
        """Whether batches are packed; `auto` is settled before, and the reference never is."""
        return self.trainer.packing is True and not self.reference


def row_stream(rows: int, seed: int, client: str, first: int) -> Iterator[int]:
    """Yield row numbers for ever: epoch after epoch of fresh permutations, from position `first` of that stream.

    The stream is a pure function of (seed, client), so a client that takes part in every round passes over all its
    rows before any row comes again, and a resumed run needs no saved position.
    """
    epoch, skip = divmod(first, rows)
    while True:
        order = torch.randperm(rows, generator=seeds.generator(seed, epoch, client, "rows")).tolist()
        yield from order[skip:]
        epoch, skip = epoch + 1, 0


def chosen_steps(steps: list[list[int]], chosen: Sequence[int] | None, further: Iterator[int]) -> list[list[int]]:
    """Return the steps of a round that `Fit.steps` asks for.

    Args:
        steps: those that the round has.
        further: the rows that follow them, of which steps beyond are made.
    """
    if chosen is None:
        return steps
    size = max(map(len, steps), default=1)
    more = [list(islice(further, size)) for _ in range(max(chosen, default=0) + 1 - len(steps))]
    return [(steps + more)[i] for i in chosen]


def step_rows(trainer: Trainer, lengths: Sequence[int], seed: int, round_: int, client: str) -> list[list[int]]:
    """Return the row numbers of every optimiser step of one round.

    Args:
        lengths: tokens of each of the client's rows.
        round_: the round, from 0.
    """
    rows = len(lengths)
    size = trainer.rows_per_step(rows)
    if trainer.epochs is not None:
        order = islice(row_stream(rows, seed, client, round_ * trainer.epochs * rows), trainer.epochs * rows)
        epochs = list(order)
        passes = [epochs[e * rows : (e + 1) * rows] for e in range(trainer.epochs)]
        return [one[i : i + size] for one in passes for i in range(0, rows, size)]
    if trainer.steps is not None:
        stream = row_stream(rows, seed, client, round_ * trainer.steps * size)
        return [list(islice(stream, size)) for _ in range(trainer.steps)]
    return _steps_of_tokens(trainer, lengths, seed, round_, client)


def _steps_of_tokens(trainer: Trainer, lengths: Sequence[int], seed: int, round_: int, client: str) -> list[list[int]]:
    """Cut the stream where its tokens come nearest to the rounds' budgets, carrying no rounding from round to round."""
    budget, size = trainer.tokens or 0, trainer.rows_per_step(len(lengths))
    stream, total, start = row_stream(len(lengths), seed, client, 0), 0, budget * round_
    steps: list[list[int]] = []
    while True:
        step = list(islice(stream, size))
        tokens = sum(lengths[row] for row in step)
        if total + tokens / 2 > start + budget and steps:
            return steps
        if total + tokens / 2 > start:
            steps.append(step)
        total += tokens
