"""The engine: drives the coroutines of an algorithm and performs their effects on one resident model.

Several clients' coroutines are driven in step, and what they ask to fit at the same time is trained in one pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Protocol, TypeVar

import numpy as np

from fedloom import seeds, tensors
from fedloom.algorithms.base import Algorithm, Client, Server
from fedloom.attacks import Attack, Scene
from fedloom.checkpoint import FINISHED, MemoryStore
from fedloom.client.trainer import Bench, step_rows
from fedloom.cost import METRICS
from fedloom.data.encode import Encoded
from fedloom.data.splits import ClientData
from fedloom.data.texts import TextDesk
from fedloom.runtime.aggregation import AggregationError
from fedloom.runtime.effects import Performer
from fedloom.tracking import Cohort, RoundReport, Sink, Trained
from fedloom.types import (
    Bundle,
    ClientUpdate,
    Effect,
    Memory,
    Merge,
    Message,
    ServerState,
    Split,
    Steps,
    Stopped,
    Tensors,
)
from fedloom.wire import codec
from fedloom.wire.transforms import Transform

T = TypeVar("T")
Half = Callable[[Client, Message], Steps[tuple[ClientUpdate, Memory]]]
NOBODY = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Stage:
    """All that a run's rounds need, built once.

    Attributes:
        clients: who may be asked to train, score or generate -> its rows; `public` are the server's rows.
        initial: the adapter that everybody starts from.
        attacks: who forges its updates, and how.
        rounds: of the whole run.
    """

    algorithm: Algorithm
    server: Server
    transforms: tuple[Transform, ...]
    bench: Bench
    desk: TextDesk
    encoded: Encoded
    clients: Mapping[str, ClientData]
    public: np.ndarray
    initial: Tensors
    attacks: tuple[Attack, ...]
    memories: MemoryStore
    rounds: int
    sink: Sink


@dataclass(frozen=True, slots=True)
class Errand:
    """What goes to one client of a cohort: the encoded broadcast (empty: nothing is sent), and its own memory."""

    client: str
    message: bytes
    memory: Memory


@dataclass(frozen=True, slots=True)
class Errands:
    """What goes to the clients of a cohort, each made when it is asked for, so that few messages exist at a time.

    Attributes:
        clients: the cohort, in client order.  make: a client of it -> its errand.
        base: the base log that all of them train on.
        finish: the rounds are over: `Algorithm.finish` is due, in the place of `train`.
    """

    clients: Sequence[str]
    make: Callable[[str], Errand]
    base: tuple[Merge, ...] = ()
    finish: bool = False

    def chunks(self, size: int) -> list[Sequence[str]]:
        """Return the cohort in runs of `size` clients, as they are trained in one pass; the last may be shorter."""
        return [self.clients[i : i + size] for i in range(0, len(self.clients), size)]


@dataclass(frozen=True, slots=True)
class Reply:
    """What comes back: the update as it was sent, the memory if it changed, and what both ways cost.

    Attributes:
        message: the encoded update (empty: nothing is sent).  weight, metrics: of the update.
        share: the part of its seconds that counts in the round's: below 1 where others worked at the same time.
    """

    client: str
    weight: float
    message: bytes
    metrics: Mapping[str, float]
    memory: Memory | None
    bytes_down: int
    share: float = 1.0


class Crew(Protocol):
    """Who trains the cohort."""

    def open(self) -> None:
        """Begin to get ready, without waiting for it: there are rounds to come."""
        ...

    def ready(self) -> None:
        """Wait until it is ready."""
        ...

    def replies(self, round_: int, errands: Errands) -> Iterator[Reply]:
        """Yield each client's reply, in the order of the errands."""
        ...

    def close(self) -> None:
        """Let go of what is held; the crew is not used again."""
        ...


@dataclass(slots=True)
class _Tally:
    """What one round has cost so far; `spent`: all clients together, see `cost.Spent.metrics`."""

    bytes_down: int = 0
    bytes_up: int = 0
    spent: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, Mapping[str, float]] = field(default_factory=dict)
    rejected: list[str] = field(default_factory=list)


class Engine:
    """Runs rounds, and performs what clients and the server ask for in this process."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.hands = Performer(stage.bench, stage.desk, stage.encoded, stage.clients, stage.public)

    def round(self, crew: Crew, state: ServerState, cohort: Sequence[str]) -> tuple[ServerState, RoundReport]:
        """Run one round.

        Args:
            crew: who trains.  state: before the round.  cohort: the clients that take part, in client order.

        Raises:
            Stopped: no client returned a finite update.
        """
        crew.ready()
        stage, tally, began = self.stage, _Tally(), time.perf_counter()
        stage.sink.on(Cohort(state.round, cohort))
        self.at(state)
        state = self.drive(stage.algorithm.prepare(stage.server, state), None, state.round)
        error = AggregationError(stage.algorithm, stage.server, state)
        updates = error.watched(self._attacked(state, cohort, self._updates(crew, state, cohort, tally)))
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
        after = stage.bench.attached.governed(state, after, stage.rounds)
        if stage.algorithm.tells_missed:
            # a rejected client did not keep what the round brought it
            kept = [name for name in tally.metrics if name not in tally.rejected]
            after = replace(after, seen={**state.seen, **dict.fromkeys(kept, state.round)})
        return after, self._report(after, tally, error.against(after), time.perf_counter() - began)

    def admit(
        self, state: ServerState, clients: Sequence[str]
    ) -> tuple[ServerState, Mapping[str | None, Mapping[str, float]]]:
        """Let every client have a word with the server before round 0, where the algorithm wants that.

        Returns:
            The state after, and client -> its bytes and costs; None: of all, what the server did included.
        """
        algorithm, told, costs = self.stage.algorithm, dict[str, Message](), dict[str | None, dict[str, float]]()
        if not algorithm.enrols:
            return state, {}
        self.at(state)
        total: dict[str, float] = {"bytes_up": 0}
        for name in clients:
            word = _sealed(self.drive(algorithm.enrol(self.client(name, 0)), name, 0))
            told[name] = _opened(word)
            costs[name] = {"bytes_up": len(word), **self.hands.taken(name).metrics()}
            total["bytes_up"] += len(word)
            _count(total, costs[name], 1.0)
        state = self.drive(algorithm.admit(self.stage.server, state, told), None, 0)
        _count(total, self.hands.taken(None).metrics(), 0.0)
        return state, {**costs, None: total}

    def finish(self, crew: Crew, state: ServerState, clients: Sequence[str]) -> RoundReport:
        """Let clients work on by themselves after the last round, and return what it cost.

        Args:
            crew: who trains.  state: after the last round.  clients: all of them, in client order.
        """
        crew.ready()
        tally, began = _Tally(), time.perf_counter()
        self.at(state)
        for _ in self._updates(crew, state, clients, tally, finish=True):
            pass  # what they keep is saved as it passes
        return self._report(state, tally, None, time.perf_counter() - began)

    def train(self, round_: int, errands: Sequence[Errand]) -> list[Reply]:
        """Run some clients' halves of one round, side by side."""
        return self._work(round_, errands, self.stage.algorithm.train, self.stage.transforms)

    def finish_some(self, round_: int, errands: Sequence[Errand]) -> list[Reply]:
        """Let some clients work on by themselves after the last round, side by side."""
        return self._work(round_, errands, self._finish, ())

    def _work(self, round_: int, errands: Sequence[Errand], half: Half, transforms: Sequence[Transform]) -> list[Reply]:
        clients = [self.client(errand.client, round_, errand.memory) for errand in errands]
        messages = [_opened(errand.message) for errand in errands]
        steps = [half(*both) for both in zip(clients, messages, strict=True)]
        done = self.drive_all(list(zip([c.name for c in clients], steps, strict=True)), round_)
        replies = []
        for client, errand, (update, memory) in zip(clients, errands, done, strict=True):
            for i, transform in enumerate(transforms):
                stream = self._stream(round_, client.name, f"transform:{i}")
                update, memory = transform.encode(update, memory, stream)
            changed = None if memory is client.memory else memory
            sent = _sealed(update.message)
            down = len(errand.message)
            traffic = {"bytes_down": down, "bytes_up": len(sent)}
            metrics = {**update.metrics, **traffic, **self.hands.taken(client.name).metrics()}
            replies.append(Reply(client.name, update.weight, sent, metrics, changed, down))
        return replies

    def _finish(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        metrics, memory = yield from self.stage.algorithm.finish(client, message)
        return ClientUpdate(client.name, client.weight, Message(), metrics), memory

    def client(self, name: str, round_: int, memory: Memory | None = None) -> Client:
        """Return what `name` sees in round `round_`."""
        rows = self.hands.rows(name, "train")
        kept = self.stage.memories.load(name) if memory is None else memory
        stage, server = self.stage, self.stage.server
        weight, initial, draw = stage.algorithm.weight(len(rows)), stage.initial, server.draw
        steps = len(step_rows(stage.bench.trainer, rows.lengths(), stage.bench.seed, round_, name)) if len(rows) else 0
        if server.lora is not None and stage.algorithm.mixed_ranks:
            ranks = server.lora
            initial, draw = ranks.cut(initial, name), lambda round_: ranks.cut(server.draw(round_), name)
        seed = stage.bench.seed
        return Client(name, round_, kept, len(rows), weight, initial, draw, server.lora, steps, seed)

    def at(self, state: ServerState) -> None:
        """Let the resident base be that of a state."""
        self.stage.bench.attached.rebase(state.base)

    def evaluate(self, state: ServerState, name: str, split: Split) -> Bundle:
        """Return the loss sums of what client `name` would use, on its own rows."""
        algorithm = self.stage.algorithm
        return self.at_client(state, name, lambda client, message: algorithm.evaluate(client, message, split))

    def at_client(self, state: ServerState, name: str, do: Callable[[Client, Message], Steps[T]]) -> T:
        """Return what a client finds out by itself about a state, from what the server would send it."""
        self.at(state)
        message = _opened(_sealed(self.stage.algorithm.broadcast(self.stage.server, state, name)))
        return self.drive(do(self.client(name, state.round), message), name, state.round)

    def drive(self, steps: Steps[T], client: str | None, round_: int) -> T:
        """Run a coroutine to its end, performing each effect that it yields."""
        return self.drive_all([(client, steps)], round_)[0]

    def drive_all(self, lanes: Sequence[tuple[str | None, Steps[T]]], round_: int) -> list[T]:
        """Run several clients' coroutines in step: what they yield at the same time is performed together."""
        answers: list[Any] = [None] * len(lanes)
        results: dict[int, T] = {}
        while len(results) < len(lanes):
            asked: dict[int, Effect] = {}
            for i, (_, steps) in enumerate(lanes):
                if i in results:
                    continue
                try:
                    asked[i] = steps.send(answers[i])
                except StopIteration as stop:
                    results[i] = stop.value
            for i, answer in self.hands.perform(asked, [client for client, _ in lanes], round_).items():
                answers[i] = answer
        return [results[i] for i in range(len(lanes))]

    def _updates(
        self, crew: Crew, state: ServerState, cohort: Sequence[str], tally: _Tally, *, finish: bool = False
    ) -> Iterator[ClientUpdate]:
        """Have the cohort trained and yield the updates that are finite, as the server decodes them."""
        stage, version = self.stage, state.round + (FINISHED if finish else 1)
        errands = Errands(
            cohort,
            lambda name: Errand(
                name, _sealed(stage.algorithm.broadcast(stage.server, state, name)), stage.memories.load(name)
            ),
            state.base,
            finish,
        )
        for reply in crew.replies(state.round, errands):
            _count(tally.spent, reply.metrics, reply.share)
            tally.bytes_down += reply.bytes_down
            tally.bytes_up += len(reply.message)
            tally.metrics[reply.client] = reply.metrics
            stage.sink.on(Trained(reply.client, reply.metrics))
            update = ClientUpdate(reply.client, reply.weight, _opened(reply.message), reply.metrics)
            if not _finite(update, reply.memory):
                tally.rejected.append(reply.client)
                continue
            if reply.memory is not None:
                stage.memories.save(reply.client, version, reply.memory)
            for transform in reversed(() if finish else stage.transforms):
                update = transform.decode(update)
            yield update

    def _attacked(
        self, state: ServerState, cohort: Sequence[str], updates: Iterator[ClientUpdate]
    ) -> Iterator[ClientUpdate]:
        """Let attackers replace their updates."""
        stage = self.stage
        attackers = frozenset(name for attack in stage.attacks for name in attack.clients)
        for i, attack in enumerate(stage.attacks):
            around, stream = stage.algorithm.around(stage.server, state), self._stream(state.round, None, f"attack:{i}")
            updates = attack.forge(updates, Scene(state.round, cohort, attackers, around, stage.server.lr, stream))
        return updates

    def _report(self, after: ServerState, tally: _Tally, error: float | None, seconds: float) -> RoundReport:
        valid = [m for name, m in tally.metrics.items() if name not in tally.rejected]
        tokens = sum(m["tokens"] for m in valid)
        spent = {"flops": 0.0, "fit_seconds": 0.0, **tally.spent}
        # the server's seconds are part of what the round takes between the clients' work
        _count(spent, self.hands.taken(None).metrics(), 0.0)
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
            fit_seconds=spent.pop("fit_seconds"),
            aggregation_error=error,
            flops=spent.pop("flops"),
            beside=spent,
        )

    def _stream(self, round_: int, client: str | None, purpose: str) -> Any:
        return seeds.generator(self.stage.bench.seed, round_, client, purpose)


def _count(spent: dict[str, float], metrics: Mapping[str, float], share: float) -> None:
    """Add the operations among some metrics, and the part of their seconds that counts."""
    for name in METRICS:
        if name in metrics:
            part = share if name.endswith("seconds") else 1.0
            spent[name] = spent.get(name, 0.0) + part * metrics[name]


def _sealed(message: Message) -> bytes:
    """Encode a message; an empty one is never sent."""
    return codec.encode(message.groups) if message.groups else b""


def _opened(data: bytes) -> Message:
    return Message(codec.decode(data)) if data else Message()


def _finite(update: ClientUpdate, memory: Memory | None) -> bool:
    bundles = [*update.message.groups.values(), *(memory or {}).values()]
    return math.isfinite(update.metrics["loss"]) and all(tensors.finite(b.tensors) for b in bundles)
