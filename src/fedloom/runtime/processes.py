"""The processes runtime: clients in worker processes, each with a resident base model of its own.

A cohort is cut into the chunks that the local runtime would train in one pass, so results are equal bit for bit.
Workers take them the largest first. Replies come back in any order and are kept in a file until it is their turn, so
that memory is that of a few chunks, whatever the size of the cohort.

Workers are fresh interpreters that are told the recipe as text (`worker.py`): nothing is inherited and nothing pickled.
They start when the first round is near, stay for all rounds of a regime, and end with the run, however it ends.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import PositiveInt

from fedloom import baselog, types
from fedloom.client.memory import free_bytes
from fedloom.client.trainer import step_rows
from fedloom.home import cores
from fedloom.parts import Record
from fedloom.runtime import pipes
from fedloom.runtime.base import Runtime
from fedloom.runtime.engine import Crew, Engine, Errands, Reply
from fedloom.runtime.local import LocalCrew
from fedloom.runtime.pipes import Frame
from fedloom.runtime.spill import Spill
from fedloom.runtime.team import Team, Worker, speaking
from fedloom.tracking import Phase, Warned
from fedloom.types import FedloomError, SiteError, Stopped
from fedloom.wire import codec

if TYPE_CHECKING:
    from fedloom.recipe import Recipe


class ProcessesRuntime(Runtime, name="processes"):
    """Worker processes, each with a resident base model of its own: one a GPU, or several on the CPU."""

    threads: PositiveInt = 1
    """CPU threads of each process; part of what makes two runs equal bit for bit."""
    workers: PositiveInt | Literal["auto"] = "auto"
    """Copies of the base model on which clients train at the same time; auto: one for every `shard` GPUs, or on a CPU
    as many as there are cores for their `threads` and memory for their weights, but at least 2."""
    shard: PositiveInt = 1
    """Processes that hold one copy of the frozen base between them (FSDP) and all compute the same: less memory for
    each, in no less time."""

    def lanes(self, recipe: Recipe) -> int:
        if self.workers != "auto":
            return self.workers
        if recipe.model.device.startswith("cuda"):
            return max(1, torch.cuda.device_count() // self.shard)
        if recipe.model.device != "cpu":
            return 1
        return max(2, cores() // (self.threads * self.shard))

    def conflicts(self, recipe: Recipe) -> Iterable[str]:
        yield from super().conflicts(recipe)
        if self.shard > 1 and recipe.model.quantize != "none":
            yield f"runtime.shard={self.shard} cannot cut quantised weights; set model.quantize=none or runtime.shard=1"
        if self.shard > 1 and recipe.algorithm.changes_base:
            yield (
                f"runtime.shard={self.shard} cannot change the weights that it cut, as algorithm="
                f"{recipe.algorithm.part_name} does; set runtime.shard=1"
            )
        if self.shard > 1 and recipe.adapter.twice:
            yield (
                f"runtime.shard={self.shard} cannot go through the layers twice in a pass, as adapter="
                f"{recipe.adapter.part_name} does; set runtime.shard=1, or adapter=prefix-tuning"
            )
        if self.shard > 1 and recipe.model.compile:
            yield f"runtime.shard={self.shard} cannot cut compiled layers; set model.compile=false or runtime.shard=1"
        if odd := next((part for part in _parts(recipe) if type(part).__module__ == "__main__"), None):
            yield (
                f"runtime=processes: {type(odd).__name__} is defined in the script that runs, where workers cannot "
                "find it; put it into a module of its own and import that"
            )

    def crew(self, engine: Engine, recipe: Recipe) -> Crew:
        size = 1 if self.cohort == "auto" else self.cohort
        cohort = recipe.sampler.cohort(0, engine.stage.server.clients, recipe.seed)
        chunks = -(-len(cohort) // size)
        if chunks == 1 and self.shard == 1:  # a worker would only do what this process can do itself
            return LocalCrew(engine, size)
        count = min(self.lanes(recipe), chunks)
        if self.workers == "auto" and recipe.model.device == "cpu":
            weights = sum(p.nbytes for p in engine.stage.bench.model.parameters())
            count = max(1, min(count, self.shard * free_bytes(torch.device("cpu")) // (2 * weights)))
        return ProcessesCrew(engine, recipe, count, self.shard, size)


@dataclass(slots=True)
class _Round:
    """One round on its way.

    Attributes:
        number: from 0.  chunks: the clients that are trained in one pass.  spill: replies whose turn has not come.
        due: numbers of the chunks that nobody has, the largest first.
    """

    number: int
    errands: Errands
    chunks: Sequence[Sequence[str]]
    spill: Spill
    due: list[int] = field(default_factory=list)


class ProcessesCrew:
    """Trains a cohort in teams of worker processes; a team is one worker, or the `shard` that hold one base model."""

    def __init__(self, engine: Engine, recipe: Recipe, count: int, shard: int, size: int) -> None:
        """Keep what workers will be told.

        Args:
            engine: of this process.  recipe: settled.
            count: of teams.  shard: workers of a team.  size: clients of a chunk.
        """
        self.engine, self.recipe, self.count, self.shard, self.size = engine, recipe, count, shard, size
        self.folder = engine.stage.memories.folder.parent
        self.teams: list[Team] = []
        self.meeting: TemporaryDirectory[str] | None = None
        self.heard = 0.0

    def open(self) -> None:
        """Start the workers; they load the model and the rows on their own."""
        if self.teams:
            return
        modules = {type(part).__module__ for part in _parts(self.recipe)}
        common = {"modules": sorted(m for m in modules if m.partition(".")[0] != "fedloom"), "size": self.shard}
        self.meeting = TemporaryDirectory(prefix="fedloom-") if self.shard > 1 else None
        for place in range(self.count):
            name = f"worker {place + 1} of {self.count}"
            team = Team(name)
            self.teams.append(team)
            for rank in range(self.shard):
                device = _device(self.recipe.model.device, place * self.shard + rank)
                team.workers.append(Worker(name if self.shard == 1 else f"{name}, process {rank + 1}"))
                store = str(Path(self.meeting.name) / str(place)) if self.meeting else ""
                told = {"rank": rank, "device": device, "store": store}
                team.workers[-1].say(Frame("start", {**common, **told, "recipe": self._told(device)}))

    def ready(self) -> None:
        """Wait until all workers have built their model and their rows.

        Raises:
            FedloomError: one of them could not, with what it said.
        """
        self.open()
        waiting = [worker for team in self.teams for worker in team.workers if not worker.ready]
        if not waiting:
            return
        self.engine.stage.sink.on(Phase(f"starting {len(waiting)} worker processes"))
        own = pipes.fingerprint(self.engine.stage)
        while waiting:
            for worker in speaking(waiting, None):
                frame = worker.hear()
                if frame is None or frame.kind == "error":
                    raise self._cannot_start(worker, frame)
                if frame.head["fingerprint"] != own:
                    raise SiteError(
                        f"{worker.name} has read other rows, or another initial adapter, than this process: files have "
                        "changed since the run began; start it again"
                    )
                worker.is_ready()
            waiting = [worker for worker in waiting if not worker.ready]
        self.engine.stage.sink.on(Phase(""))

    def replies(self, round_: int, errands: Errands) -> Iterator[Reply]:
        """Yield each client's reply, in the order of the errands.

        Raises:
            Stopped: no worker is left.
            FedloomError: what a worker's training raised.
        """
        self.ready()
        self.heard = time.perf_counter()
        with Spill(self.folder) as spill:
            current = _Round(round_, errands, errands.chunks(self.size), spill)
            current.due = sorted(range(len(current.chunks)), key=lambda i: -self._tokens(round_, current.chunks[i]))
            try:
                for turn in range(len(current.chunks)):
                    self._work(current, turn)
                    yield from pipes.replies(*spill.pop(turn))
            finally:
                if any(team.chunk is not None for team in self.teams):
                    self.close()  # the round is given up, and what they are at is of no use any more

    def close(self) -> None:
        """End the workers."""
        for team in self.teams:
            team.leave()
        for team in self.teams:
            team.end()
        self.teams = []
        if self.meeting is not None:
            self.meeting.cleanup()
            self.meeting = None

    def _work(self, current: _Round, turn: int) -> None:
        """Keep all teams busy, at least until the replies of chunk `turn` are there."""
        while True:
            waits = turn not in current.spill
            for team in self.teams:
                if team.chunk is None and current.due:
                    team.chunk = current.due.pop(0)
                    team.clients = current.chunks[team.chunk]
                    errands = [current.errands.make(name) for name in team.clients]
                    if merges := baselog.news(current.errands.base, team.base):
                        team.say(Frame("base", {}, [codec.encode(merges)]))
                    team.base = current.number
                    team.say(pipes.train(team.chunk, current.number, errands, current.errands.finish))
            of = {worker: team for team in self.teams for worker in team.workers}
            for worker in speaking(of, None if waits else 0.0):
                if of[worker] in self.teams:
                    self._hear(current, worker, of[worker], turn)
            if not waits:
                return

    def _hear(self, current: _Round, worker: Worker, team: Team, turn: int) -> None:
        """Take in what a worker says; a team that is gone leaves its chunk to another."""
        frame = worker.hear()
        if frame is None or (frame.kind == "error" and team.broken(worker)):
            self._lose(current, team)
        elif frame.kind == "error":
            raise self._raised(current.number, team, frame.head)
        elif frame.kind == "step":
            self.engine.stage.bench.on_step(frame.head["client"], frame.head["tokens"], frame.head["loss"])
        elif worker is team.workers[0] and team.chunk is not None:
            # where several workers fit at once each moment counts once, so that a round's speed is what a clock shows
            now, seconds = time.perf_counter(), pipes.seconds(frame)
            share = min(1.0, (now - self.heard) / seconds) if seconds else 1.0
            current.spill.put(team.chunk, frame, share, team.chunk == turn)
            self.heard, team.chunk = now, None

    def _lose(self, current: _Round, team: Team) -> None:
        """Go on without a team, or stop where none is left."""
        how, where = team.end(), f"round {current.number + 1}"
        self.teams.remove(team)
        if team.chunk is not None:
            current.due.insert(0, team.chunk)
        if not self.teams:
            fewer = f" runtime.workers={self.count // 2}" if self.count > 1 else ""
            raise Stopped(
                f"{where}: no worker process is left: {how}\nthe state before this round is saved. Mostly memory is "
                f"short: make room, then go on with: fedloom run --resume {self._run()}{fewer}"
            )
        work = f"; another trains {', '.join(team.clients)}" if team.chunk is not None else ""
        self.engine.stage.sink.on(Warned(f"{where}: {how}{work}"))

    def _tokens(self, round_: int, clients: Sequence[str]) -> int:
        """Return how many tokens these clients will train on."""
        bench, total = self.engine.stage.bench, 0
        for name in clients:
            lengths = self.engine.hands.rows(name, "train").lengths()
            steps = step_rows(bench.trainer, lengths, bench.seed, round_, name)
            total += sum(lengths[row] for step in steps for row in step)
        return total

    def _cannot_start(self, worker: Worker, frame: Frame | None) -> FedloomError:
        if frame is not None and frame.head["for_people"]:
            return _like(frame.head, worker.name)
        how = worker.end() if frame is None else f"{worker.name}: {frame.head['type']}: {frame.head['text']}"
        fewer = "lower runtime.workers, or " if self.count > 1 else ""
        return SiteError(f"a worker process could not get ready: {how}\nnext: {fewer}use runtime=local")

    def _raised(self, round_: int, team: Team, error: Mapping[str, Any]) -> Exception:
        where = f"{team.name}, training {', '.join(team.clients)}"
        if error["for_people"]:
            return _like(error, where)
        text = f"{error['type']}: {error['text']}"
        if any(word in text for word in ("OutOfMemory", "MemoryError", "allocate memory")):
            return Stopped(
                f"round {round_ + 1}: {where}: out of memory ({error['text']}); the state before this round is saved. "
                f"Make room, then go on with: fedloom run --resume {self._run()}"
            )
        return RuntimeError(f"{where}: {text}\n{error['trace']}")

    def _run(self) -> Path:
        """Return the run folder, also of a compared regime."""
        return self.folder.parent.parent if self.folder.parent.name == "regimes" else self.folder

    def _told(self, device: str) -> str:
        """Return the recipe as a worker on a device reads it."""
        # a team cuts the base before the device sees it, which may be too small for all of it
        place = device if self.shard == 1 else "cpu"
        model = self.recipe.model.model_copy(update={"device": place})
        return json.dumps(self.recipe.model_copy(update={"model": model}).dump())


def _device(device: str, number: int) -> str:
    """Return the device of a worker: every one has a GPU of its own where the recipe names none in particular."""
    return f"cuda:{number % torch.cuda.device_count()}" if device == "cuda" else device


def _parts(node: object) -> Iterator[Record]:
    """Yield a record and all records in it."""
    if isinstance(node, Record):
        yield node
        for name in type(node).model_fields:
            yield from _parts(getattr(node, name))
    elif isinstance(node, Mapping):
        for value in node.values():
            yield from _parts(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _parts(value)


def _like(error: Mapping[str, Any], where: str) -> FedloomError:
    """Return an error of the kind that a worker had."""
    kind: type[FedloomError] = getattr(types, error["type"], FedloomError)
    return kind(f"{where}: {error['text']}")
