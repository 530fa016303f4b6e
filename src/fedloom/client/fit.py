"""The local training loop: one client, or a cohort of clients in one pass over the one resident model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedloom import seeds
from fedloom.client.attention import by_piece, states
from fedloom.client.batches import Batch, collate, passes
from fedloom.client.checkpointing import checkpointed
from fedloom.client.stack import Stack
from fedloom.client.trainer import Bench, Rows, chosen_steps, row_stream, step_rows
from fedloom.data.encode import Example
from fedloom.types import Bundle, Fit, Fitted, Penalty, Tensors

SCORE_TOKENS = 4096
"""Tokens of one forward pass without gradients."""


@dataclass(slots=True)
class Job:
    """One client's training in one round, and how far it has come.

    Attributes:
        client: the client.  round: from 0.  rows: its training rows.  effect: what it asks for.
    """

    client: str
    round: int
    rows: Rows
    effect: Fit
    steps: list[list[int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    slopes: list[float] = field(default_factory=list)
    taken: int = 0
    examples: int = 0
    tokens: int = 0

    def on(self) -> bool:
        """Return whether there is a step left; a loss that is not finite ends the training at once."""
        return len(self.losses) < len(self.steps) and all(math.isfinite(loss) for loss in self.losses[-1:])

    def step(self) -> list[tuple[int, int]]:
        """Return the (row, tokens) of the step that is due."""
        return [(row, self.lengths[row]) for row in self.steps[len(self.losses)]]


def fit(bench: Bench, jobs: Sequence[Job]) -> list[Fitted]:
    """Train some clients' adapters, each on its own rows as its `Fit` says, in the same passes over the base model.

    Every client has its own factors, penalty, correction, clipping, optimiser and number of steps, so this equals
    training one after another up to rounding. All must train the same names, in the same order of derivatives.

    Args:
        bench: the resident model and what to do on it.
        jobs: K clients.

    Returns:
        The trained weights on the CPU, client by client. A non-finite loss ends that client's training and stays in its
        `losses`, so that the update can be rejected.
    """
    trainer, effect = bench.trainer, jobs[0].effect
    for job in jobs:
        job.lengths = job.rows.lengths()
        job.steps = _steps(bench, job)
    factor = bench.factor(jobs[0].round)
    lrs = [(trainer.lr if job.effect.lr is None else job.effect.lr) * factor for job in jobs]
    stack = bench.attached.load([job.effect.start for job in jobs], effect.trainable or bench.attached.moves)
    lanes = [_Lane(job, bench, lrs[k], stack, k) for k, job in enumerate(jobs)]
    final: dict[str, dict[str, Tensor]] = {}
    states: dict[str, Bundle] = {}
    work = _first_order if effect.order == "first" else _zeroth_order
    with checkpointed(bench.model, trainer.checkpointing is True and effect.order == "first"):
        while True:
            done = [k for k, lane in enumerate(lanes) if not lane.job.on()]
            if done:
                final.update({lanes[k].job.client: stack.values(k) for k in done})
                states.update({lanes[k].job.client: lanes[k].state() for k in done})
                lanes = _narrow(bench, stack, lanes, done)
            if not lanes:
                break
            work(bench, stack, lanes)
            for lane in lanes:
                lane.finish_step(bench)
    return [
        Fitted(final[j.client], j.taken, lr, j.examples, j.tokens, tuple(j.losses), tuple(j.slopes), states[j.client])
        for j, lr in zip(jobs, lrs, strict=True)
    ]


def _steps(bench: Bench, job: Job) -> list[list[int]]:
    if not job.lengths:
        return []
    steps = step_rows(bench.trainer, job.lengths, bench.seed, job.round, job.client)
    taken = (job.round + 1) * sum(map(len, steps))
    return chosen_steps(steps, job.effect.steps, row_stream(len(job.lengths), bench.seed, job.client, taken))


class _Lane:
    """A client's place in the stack: its optimiser, correction and dropout stream."""

    def __init__(self, job: Job, bench: Bench, lr: float, stack: Stack, k: int) -> None:
        self.job, self.lr, self.clip_norm, self.decay = job, lr, bench.trainer.clip_norm, bench.trainer.decay
        self.row = nn.Parameter(stack.flat[k], requires_grad=False)
        self.stream = seeds.generator(bench.seed, job.round, job.client, "dropout")
        self.optimizer = bench.trainer.optimizer.build([self.row], lr)
        correct = job.effect.correct
        self.correct = None if correct is None else stack.pack(correct.tensors, self.row.device, self.row.dtype)
        self.where = correct.where if correct is not None else None
        self.move(stack, k)
        if job.effect.optimizer_state is not None and job.effect.optimizer_state.tensors:
            kept = {name: t.clone() for name, t in job.effect.optimizer_state.tensors.items()}
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": {0: kept}})

    def state(self) -> Bundle:
        """Return what the optimiser keeps, where it was asked for, on the CPU."""
        if self.job.effect.optimizer_state is None:
            return Bundle()
        kept = self.optimizer.state_dict()["state"].get(0, {})
        return Bundle({name: t.detach().cpu().clone() for name, t in kept.items() if t is not None})

    def move(self, stack: Stack, k: int) -> None:
        """Take place k of the stack, whose row holds this client's values."""
        self.row.data, self.row.grad, self.grads = stack.flat[k], stack.grad[k], stack.grads(k)

    def step(self) -> None:
        """Correct, clip and step."""
        gradient = self.row.grad
        if self.correct is not None and self.where == "gradient" and gradient is not None:
            gradient.add_(self.correct)
        if self.clip_norm is not None:
            norm = nn.utils.get_total_norm(self.grads)
            nn.utils.clip_grads_with_norm_([self.row], self.clip_norm, norm)
        lr = self.lr * (1 - (1 - self.decay) * self.job.taken / len(self.job.steps))
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        if self.correct is not None and self.where == "weights":
            self.row.data.sub_(self.correct, alpha=lr)

    def finish_step(self, bench: Bench) -> None:
        """Take the step unless the loss is not finite, and book it."""
        job = self.job
        if not math.isfinite(job.losses[-1]):
            return
        self.step()
        rows = job.steps[len(job.losses) - 1]
        size = sum(job.lengths[row] for row in rows)
        job.taken, job.examples, job.tokens = job.taken + 1, job.examples + len(rows), job.tokens + size
        bench.on_step(job.client, size, job.losses[-1])


def _narrow(bench: Bench, stack: Stack, lanes: Sequence[_Lane], done: Sequence[int]) -> list[_Lane]:
    """Go on with the clients that are not done."""
    kept = [k for k in range(len(lanes)) if k not in set(done)]
    if kept:
        stack.keep(kept)
        bench.attached.bind(stack)
    for place, k in enumerate(kept):
        lanes[k].move(stack, place)
    return [lanes[k] for k in kept]


def _first_order(bench: Bench, stack: Stack, lanes: Sequence[_Lane]) -> None:
    """Fill the gradients of every client's mean loss (over all its labels) plus its penalty; book the losses."""
    batches = _batches(bench, [lane.job for lane in lanes])
    counts = _counts(bench, batches)
    totals = torch.zeros(len(lanes), dtype=torch.float64)
    stack.zero_grad()
    with bench.attached.dropout([lane.stream for lane in lanes]), torch.enable_grad():
        for batch in batches:
            with bench.attached.owned(batch.spans), by_piece(bench.model) if batch.pieces else nullcontext():
                losses = bench.objective.losses(bench.model, batch, bench.reference)
                stack.backward((losses / counts.to(losses.device, losses.dtype)).sum())
            totals += losses.detach().double().cpu()
        for k, lane in enumerate(lanes):
            for penalty in _asked(bench, lane):
                stack.backward(penalty(stack.client(k)))
    for lane, total, count in zip(lanes, totals, counts, strict=True):
        lane.job.losses.append(float(total / count))


@torch.no_grad()
def _zeroth_order(bench: Bench, stack: Stack, lanes: Sequence[_Lane]) -> None:
    """As `_first_order`, the gradient estimated along one direction a client: see `Fit.order`."""
    batches = _batches(bench, [lane.job for lane in lanes])
    counts, still = _counts(bench, batches), stack.flat.clone()
    directions = torch.stack([_direction(bench, stack, lane.job) for lane in lanes])
    epsilon = torch.tensor([lane.job.effect.epsilon for lane in lanes], dtype=still.dtype)[:, None].to(still.device)
    found = []
    for sign in (1.0, -1.0):
        # in place, as the layers' factors are views of it
        stack.flat.copy_(still + sign * epsilon * directions)
        totals = torch.zeros(len(lanes), dtype=torch.float64)
        for batch in batches:
            with bench.attached.owned(batch.spans), torch.inference_mode():
                totals += bench.objective.losses(bench.model, batch, bench.reference).double().cpu()
        found.append(totals / counts + _penalties(bench, stack, lanes))
    stack.flat.copy_(still)
    slopes = (found[0] - found[1]) / (2 * epsilon[:, 0].double().cpu())
    stack.grad.copy_(slopes.to(still.device, still.dtype)[:, None] * directions)
    for lane, slope, mean in zip(lanes, slopes, (found[0] + found[1]) / 2, strict=True):
        lane.job.slopes.append(float(slope))
        lane.job.losses.append(float(mean))


def _direction(bench: Bench, stack: Stack, job: Job) -> Tensor:
    """Draw z of the step that is due, on the CPU so that every device gets the same, in the client's own shapes."""
    stream = seeds.generator(bench.seed, job.round, job.client, f"zeroth:{len(job.losses)}")
    own = {name: torch.randn(job.effect.start[name].shape, generator=stream) for name in stack.moving}
    return stack.pack(own, stack.flat.device, stack.flat.dtype)


def _asked(bench: Bench, lane: _Lane) -> list[Penalty]:
    """Return what is added to a client's loss, by its algorithm and by the adapter's own method."""
    return [one for one in (lane.job.effect.penalty, bench.attached.penalty) if one is not None]


def _penalties(bench: Bench, stack: Stack, lanes: Sequence[_Lane]) -> Tensor:
    values = torch.zeros(len(lanes), dtype=torch.float64)
    for k, lane in enumerate(lanes):
        for penalty in _asked(bench, lane):
            values[k] += penalty(stack.client(k)).double().cpu()
    return values


def _counts(bench: Bench, batches: Sequence[Batch]) -> Tensor:
    """Return (K,) what each client's losses of one step are divided by."""
    return torch.tensor([bench.objective.counts(batch) for batch in batches], dtype=torch.float64).sum(0)


def _batches(bench: Bench, jobs: Sequence[Job]) -> list[Batch]:
    """Cut one step's rows into forward passes; the reference keeps them in the order drawn, `batch` rows a pass."""
    size, steps = bench.trainer.batch, [job.step() for job in jobs]
    if bench.reference:
        rows = [row for row, _ in steps[0]]
        cut = [[rows[i : i + size]] for i in range(0, len(rows), size)]
    else:
        cut = passes(steps, bench.trainer.micro_tokens, packed=bench.packed)
    share = not bench.attached.drops  # with dropout, rows differ in what is dropped at their beginning
    return [
        collate(
            [[job.rows[row] for row in chosen] for job, chosen in zip(jobs, one, strict=True)],
            bench.model.device,
            packed=bench.packed,
            share=share,
        )
        for one in cut
    ]


def gradient(bench: Bench, rows: Rows, params: Tensors) -> dict[str, Tensor]:
    """Return the gradient of the mean loss (over all labels) of an adapter on some rows, on the CPU.

    Args:
        rows: those that count.  params: where the gradient is taken.
    """
    stack = bench.attached.load([params])
    stack.zero_grad()
    job = Job("", 0, rows, Fit(params), steps=[list(range(len(rows)))], lengths=rows.lengths())
    batches = _batches(bench, [job])
    counts = _counts(bench, batches)
    with torch.enable_grad():
        for batch in batches:
            with bench.attached.owned(batch.spans), by_piece(bench.model) if batch.pieces else nullcontext():
                losses = bench.objective.losses(bench.model, batch, bench.reference)
                stack.backward((losses / counts.to(losses.device, losses.dtype)).sum())
    return {name: t.detach().cpu().clone() for name, t in zip(stack.moving, stack.grads(0), strict=True)}


@torch.inference_mode()
def losses(bench: Bench, rows: Rows, params: Tensors | None) -> Bundle:
    """Return the loss of an adapter (None: of the base alone) on each row, as `Losses` says."""
    if params is not None:
        bench.attached.load([params])
    nll = torch.zeros(len(rows), dtype=torch.float64)
    with nullcontext() if params is not None else bench.attached.off():
        for (one,) in passes([list(enumerate(rows.lengths()))], SCORE_TOKENS, packed=bench.packed):
            # every row a lane of its own: its losses are summed apart, whatever the objective
            batch = collate([[rows[row]] for row in one], bench.model.device, packed=bench.packed)
            with bench.attached.owned((batch.ids.numel(),)):
                nll[one] = bench.objective.losses(bench.model, batch, bench.reference).double().cpu()
    answered = rows.encoded.answer_bytes[rows.indices]
    sizes = torch.tensor(rows.labels(), dtype=torch.float64), torch.from_numpy(answered).double()
    return Bundle({"nll": nll, "tokens": sizes[0], "bytes": sizes[1]})


@torch.inference_mode()
def embeddings(bench: Bench, prompts: Sequence[Sequence[int]], params: Tensors | None, pool: str) -> Tensor:
    """Return (n, d) float32 last hidden states of prompts' tokens, as `Embed` says."""
    if params is not None:
        bench.attached.load([params])
    found = []
    with nullcontext() if params is not None else bench.attached.off():
        for prompt in prompts:
            ids = torch.tensor(list(prompt), device=bench.model.device)
            example = Example(ids, torch.ones(len(ids), dtype=torch.bool))
            hidden = states(bench.model, collate([[example]], bench.model.device, packed=False)).float().cpu()
            found.append(hidden[-1] if pool == "last" else hidden.mean(0))
    width = bench.model.config.get_text_config().hidden_size
    return torch.stack(found) if found else torch.zeros(0, width)


@torch.inference_mode()
def score(bench: Bench, rows: Rows, params: Tensors | None) -> Bundle:
    """Return the loss sums of an adapter (None: of the base alone) on some rows.

    Returns:
        A bundle of scalars: `nll` (nats), `tokens` (trained ones), `bytes` (of the answers), `examples`. Sums of
        disjoint sets of rows add up to the sums of their union.
    """
    if params is not None:
        bench.attached.load([params])
    total, count = 0.0, 0
    with nullcontext() if params is not None else bench.attached.off():
        for (one,) in passes([list(enumerate(rows.lengths()))], SCORE_TOKENS, packed=bench.packed):
            batch = collate([[rows[row] for row in one]], bench.model.device, packed=bench.packed)
            total += float(bench.objective.losses(bench.model, batch, bench.reference).sum())
            count += sum(bench.objective.counts(batch))
    sums = {"nll": total, "tokens": count, "bytes": rows.answer_bytes(), "examples": len(rows)}
    return Bundle(scalars={name: float(value) for name, value in sums.items()})
