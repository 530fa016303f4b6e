"""The sequential engine: drives the coroutines of an algorithm and performs their effects on one resident model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from fedloom import seeds, tensors
from fedloom.algorithms.base import Algorithm, Client, Server
from fedloom.checkpoint import MemoryStore
from fedloom.client import generate, trainer
from fedloom.client.trainer import Bench, Rows
from fedloom.data.encode import Encoded
from fedloom.data.splits import ClientData
from fedloom.tracking import Cohort, RoundReport, Sink, Trained
from fedloom.types import (
    Bundle,
    ClientUpdate,
    Effect,
    Fit,
    Generate,
    Memory,
    Message,
    Score,
    ServerState,
    Split,
    Steps,
    Stopped,
    Tensors,
)
from fedloom.wire import codec
from fedloom.wire.transforms import Transform

T = TypeVar("T")
NOBODY = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Stage:
    """All that a run's rounds need, built once.

    Attributes:
        clients: who may be asked to train, score or generate -> its rows; `public` are the server's rows.
        initial: the adapter that everybody starts from.
        rounds: of the whole run.
    """

    algorithm: Algorithm
    server: Server
    transforms: tuple[Transform, ...]
    bench: Bench
    tokenizer: PreTrainedTokenizerBase
    encoded: Encoded
    clients: Mapping[str, ClientData]
    public: np.ndarray
    initial: Tensors
    memories: MemoryStore
    rounds: int
    sink: Sink


@dataclass(slots=True)
class _Tally:
    """What one round has cost so far."""

    bytes_down: int = 0
    bytes_up: int = 0
    fit_seconds: float = 0.0
    metrics: dict[str, Mapping[str, float]] = field(default_factory=dict)
    rejected: list[str] = field(default_factory=list)


class Engine:
    """Runs clients one after another in this process."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._fit_seconds = 0.0

    def round(self, state: ServerState, cohort: Sequence[str]) -> tuple[ServerState, RoundReport]:
        """Run one round.

        Args:
            state: before the round.  cohort: the clients that take part, in client order.

        Raises:
            Stopped: no client returned a finite update.
        """
        stage, tally, began = self.stage, _Tally(), time.perf_counter()
        stage.sink.on(Cohort(state.round, cohort))
        updates = self._updates(state, cohort, tally)
        first = next(updates, None)
        if first is None:
            raise Stopped(
                f"round {state.round + 1}: no client returned a finite loss and update ({', '.join(tally.rejected)}); "
                "the state before this round is saved. Lower trainer.lr, set trainer.clip_norm, or look at the data, "
                "then start anew"
            )
        combined = self.drive(stage.algorithm.combine(stage.server, state, chain([first], updates)), None, state.round)
        for i, transform in enumerate(stage.transforms):
            combined = transform.finish(combined, self._stream(state.round, None, f"finish:{i}"))
        after = self.drive(stage.algorithm.step(stage.server, state, combined), None, state.round)
        return after, self._report(after, tally, time.perf_counter() - began)

    def client(self, name: str, round_: int, memory: Memory | None = None) -> Client:
        """Return what `name` sees in round `round_`."""
        examples = len(self.stage.clients[name].train)
        kept = self.stage.memories.load(name) if memory is None else memory
        return Client(name, round_, kept, examples, self.stage.algorithm.weight(examples), self.stage.initial)

    def evaluate(self, state: ServerState, name: str, split: Split) -> Bundle:
        """Return the loss sums of what client `name` would use, on its own rows."""
        algorithm = self.stage.algorithm
        message = Message(codec.decode(codec.encode(algorithm.broadcast(state, name).groups)))
        return self.drive(algorithm.evaluate(self.client(name, state.round), message, split), name, state.round)

    def drive(self, steps: Steps[T], client: str | None, round_: int) -> T:
        """Run a coroutine to its end, performing each effect that it yields."""
        answer: Any = None
        try:
            while True:
                answer = self.perform(steps.send(answer), client, round_)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    def perform(self, effect: Effect, client: str | None, round_: int) -> Any:
        """Perform one effect on the rows of `client`, or on the server's public rows."""
        bench = self.stage.bench
        match effect:
            case Fit():
                began = time.perf_counter()
                fitted = trainer.fit(bench, self.rows(client, "train"), effect, round_, client or "server")
                self._fit_seconds += time.perf_counter() - began
                return fitted
            case Score():
                return trainer.score(bench, self.rows(client, effect.split), effect.params)
            case Generate():
                return self.generate(effect.params, effect.prompts, effect.max_new_tokens)

    def generate(self, params: Tensors | None, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Return greedy answers of an adapter (None: of the base alone)."""
        bench = self.stage.bench
        if params is None:
            with bench.attached.off():
                return generate.greedy(bench.model, self.stage.tokenizer, prompts, max_new_tokens)
        bench.attached.load([params])
        return generate.greedy(bench.model, self.stage.tokenizer, prompts, max_new_tokens)

    def rows(self, client: str | None, split: Split) -> Rows:
        """Return the rows of one client's split, or the server's public rows."""
        if client is None:
            return Rows(self.stage.encoded, self.stage.public)
        data = self.stage.clients[client]
        return Rows(self.stage.encoded, {"train": data.train, "validation": data.validation, "test": data.test}[split])

    def _updates(self, state: ServerState, cohort: Sequence[str], tally: _Tally) -> Iterator[ClientUpdate]:
        """Train the cohort and yield the updates that are finite, as the server decodes them."""
        before = self._fit_seconds
        for name in cohort:
            update, memory = self._train(state, name, tally)
            tally.fit_seconds = self._fit_seconds - before
            tally.metrics[name] = update.metrics
            self.stage.sink.on(Trained(name, update.metrics))
            if not _finite(update, memory):
                tally.rejected.append(name)
                continue
            if memory is not None:
                self.stage.memories.save(name, state.round + 1, memory)
            for transform in reversed(self.stage.transforms):
                update = transform.decode(update)
            yield update

    def _train(self, state: ServerState, name: str, tally: _Tally) -> tuple[ClientUpdate, Memory | None]:
        """Return one client's update as it arrives, and its memory if that changed."""
        stage = self.stage
        sent = stage.algorithm.broadcast(state, name)
        message, size = _travel(sent)
        tally.bytes_down += size
        client = self.client(name, state.round)
        update, memory = self.drive(stage.algorithm.train(client, message), name, state.round)
        for i, transform in enumerate(stage.transforms):
            update, memory = transform.encode(update, memory, self._stream(state.round, name, f"transform:{i}"))
        arrived, size = _travel(update.message)
        tally.bytes_up += size
        update = ClientUpdate(update.client, update.weight, arrived, update.metrics)
        return update, None if memory is client.memory else memory

    def _report(self, after: ServerState, tally: _Tally, seconds: float) -> RoundReport:
        valid = [m for name, m in tally.metrics.items() if name not in tally.rejected]
        tokens = sum(m["tokens"] for m in valid)
        return RoundReport(
            round=after.round,
            rounds=self.stage.rounds,
            loss=sum(m["loss"] * m["tokens"] for m in valid) / max(1, tokens),
            clients=tally.metrics,
            rejected=tally.rejected,
            tokens=int(tokens),
            examples=int(sum(m["examples"] for m in valid)),
            bytes_down=tally.bytes_down,
            bytes_up=tally.bytes_up,
            seconds=seconds,
            fit_seconds=tally.fit_seconds,
        )

    def _stream(self, round_: int, client: str | None, purpose: str) -> Any:
        return seeds.generator(self.stage.bench.seed, round_, client, purpose)


def _travel(message: Message) -> tuple[Message, int]:
    """Encode a message and decode it at the other end; return it with its bytes (an empty one is never sent)."""
    if not message.groups:
        return message, 0
    data = codec.encode(message.groups)
    return Message(codec.decode(data)), len(data)


def _finite(update: ClientUpdate, memory: Memory | None) -> bool:
    bundles = [*update.message.groups.values(), *(memory or {}).values()]
    return math.isfinite(update.metrics["loss"]) and all(tensors.finite(b.tensors) for b in bundles)
