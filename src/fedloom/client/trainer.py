"""The local training loop: rows in, steps, weights out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Self

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedloom import seeds
from fedloom.client.adapters import Attached
from fedloom.client.objectives import Batch, Objective, collate
from fedloom.client.optimizers import AdamW, Constant, Optimizer, Schedule
from fedloom.data.encode import Encoded, Example
from fedloom.parts import Record
from fedloom.types import Bundle, Correction, Fit, Fitted, Tensors

SCORE_TOKENS = 4096
"""Padded tokens of one forward pass without gradients."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Some of the encoded examples, read when they are needed.

    Attributes:
        encoded: all examples.  indices: (n,) which of them.
    """

    encoded: Encoded
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, row: int) -> Example:
        return self.encoded.example(int(self.indices[row]))

    def lengths(self) -> list[int]:
        """Return the number of tokens of each row."""
        starts = self.encoded.starts
        return (starts[self.indices + 1] - starts[self.indices]).tolist()  # type: ignore[no-any-return]

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
    clip_norm: PositiveFloat | None = 1.0
    """Largest joint gradient norm of a step; null: no clipping."""
    micro_tokens: Annotated[int, Field(ge=1)] = 1024
    """Padded tokens of one forward pass: a step's rows are cut into passes of at most this size (at least one row)."""

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


def micro_batches(step: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Sort a step's rows by length and cut them into passes of at most `limit` padded tokens (at least one row)."""
    passes: list[list[int]] = []
    for row in sorted(step, key=lambda r: lengths[r]):
        if passes and (len(passes[-1]) + 1) * lengths[row] <= limit:
            passes[-1].append(row)
        else:
            passes.append([row])
    return passes


def fit(bench: Bench, rows: Rows, effect: Fit, round_: int, client: str) -> Fitted:
    """Train one client's adapter on its rows, as `Fit` says.

    Args:
        bench: the resident model and what to do on it.
        rows: the client's training examples.
        effect: start weights, penalty, correction and the trainable names.
        round_: the round, from 0.  client: the client's name.

    Returns:
        The trained weights on the CPU. A non-finite loss ends the training at once and stays in `losses`, so that
        the update can be rejected.
    """
    trainer, lengths = bench.trainer, rows.lengths()
    params = bench.attached.load([effect.start])
    moving = {n: p for n, p in params.items() if effect.trainable is None or effect.trainable(n)}
    for name, p in params.items():
        p.requires_grad_(name in moving)
    lr = trainer.lr * trainer.schedule.factor(round_, bench.schedule_rounds)
    optimizer = trainer.optimizer.build(moving.values(), lr)
    streams = [seeds.generator(bench.seed, round_, client, "dropout")]
    losses: list[float] = []
    taken = examples = tokens = 0
    with bench.attached.dropout(streams), torch.enable_grad():
        for step in step_rows(trainer, lengths, bench.seed, round_, client):
            losses.append(_backward(bench, _batches(bench, rows, lengths, step), effect.penalty, params))
            if not math.isfinite(losses[-1]):
                break
            _step(optimizer, moving, trainer.clip_norm, effect.correct, lr)
            size = sum(lengths[row] for row in step)
            taken, examples, tokens = taken + 1, examples + len(step), tokens + size
            bench.on_step(client, size, losses[-1])
    final = {name: p.detach()[0].cpu().clone() for name, p in params.items()}
    for p in params.values():
        p.requires_grad_(False)
        p.grad = None
    return Fitted(final, taken, lr, examples, tokens, tuple(losses))


@torch.inference_mode()
def score(bench: Bench, rows: Rows, params: Tensors | None) -> Bundle:
    """Return the loss sums of an adapter (None: of the base alone) on some rows.

    Returns:
        A bundle of scalars: `nll` (nats), `tokens` (trained ones), `bytes` (of the answers), `examples`. Sums of
        disjoint sets of rows add up to the sums of their union.
    """
    if params is not None:
        bench.attached.load([params])
    lengths, device, nll, count = rows.lengths(), bench.model.device, 0.0, 0
    with nullcontext() if params is not None else bench.attached.off():
        for one in micro_batches(range(len(rows)), lengths, SCORE_TOKENS):
            batch = collate([rows[row] for row in one], device)
            nll += float(bench.objective.loss(bench.model, batch, bench.reference))
            count += bench.objective.count(batch)
    sums = {"nll": nll, "tokens": count, "bytes": rows.answer_bytes(), "examples": len(rows)}
    return Bundle(scalars={name: float(value) for name, value in sums.items()})


def _batches(bench: Bench, rows: Rows, lengths: Sequence[int], step: Sequence[int]) -> list[Batch]:
    """Cut one step's rows into forward passes; the reference keeps them in the order drawn, `batch` rows a pass."""
    size = bench.trainer.batch
    if bench.reference:
        passes = [list(step[i : i + size]) for i in range(0, len(step), size)]
    else:
        passes = micro_batches(step, lengths, bench.trainer.micro_tokens)
    return [collate([rows[row] for row in one], bench.model.device) for one in passes]


def _backward(
    bench: Bench,
    batches: Sequence[Batch],
    penalty: Callable[[Tensors], Tensor] | None,
    params: dict[str, nn.Parameter],
) -> float:
    """Accumulate the gradient of the step's mean loss (over all its labels) plus the penalty; return the mean loss."""
    count = sum(bench.objective.count(batch) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = bench.objective.loss(bench.model, batch, bench.reference)
        (loss / count).backward()
        total += float(loss.detach())
    if penalty is not None:
        penalty({name: p[0] for name, p in params.items()}).backward()
    return total / count


def _step(
    optimizer: torch.optim.Optimizer,
    moving: dict[str, nn.Parameter],
    clip_norm: float | None,
    correct: Correction | None,
    lr: float,
) -> None:
    """Correct, clip and step; then clear the gradients."""
    if correct is not None and correct.where == "gradient":
        for name in moving.keys() & correct.tensors.keys():
            _grad(moving[name]).add_(correct.tensors[name].to(moving[name].device))
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(moving.values(), clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if correct is not None and correct.where == "weights":
        with torch.no_grad():
            for name in moving.keys() & correct.tensors.keys():
                moving[name].sub_(correct.tensors[name].to(moving[name].device), alpha=lr)


def _grad(p: nn.Parameter) -> Tensor:
    if p.grad is None:
        p.grad = torch.zeros_like(p)
    return p.grad
