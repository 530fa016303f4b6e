"""What a round costs beside training depends on the clients that take part, not on those that could have."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tests.helpers import tree

import fedloom
from fedloom import recipe as recipes
from fedloom.assets import prepare
from fedloom.recipe import Recipe, overlay
from fedloom.runtime.engine import Errands, Reply
from fedloom.tracking import Sink
from fedloom.types import Bundle
from fedloom.wire import codec
from fedloom.world import World

ROUNDS, COHORT = 3, 10
SOURCE = str(Path(fedloom.__file__).parent)


class Idle:
    """A crew whose clients answer at once: with no change of the weights, and with a memory."""

    def __init__(self, groups: dict[str, Bundle]) -> None:
        self.groups, self.message = groups, codec.encode(groups)

    def open(self) -> None: ...

    def ready(self) -> None: ...

    def close(self) -> None: ...

    def replies(self, round_: int, errands: Errands) -> Iterator[Reply]:
        metrics = {"loss": 1.0, "loss_first": 1.0, "examples": 2.0, "tokens": 9.0, "steps": 1.0, "lr": 0.1}
        metrics |= {"bytes_down": 1.0, "bytes_up": 1.0, "flops": 1.0}
        for (name,) in errands.chunks(1):
            errand = errands.make(name)
            yield Reply(name, 1.0, self.message, metrics, self.groups, len(errand.message), 0.0)


class Watched(list[str]):
    """A list that may be asked for an element, but not be gone through."""

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("a round went through all clients")


class WatchedDict(dict[str, Any]):
    """A mapping that may be asked for an element, but not be gone through."""

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("a round went through all clients")

    keys = values = items = __iter__  # type: ignore[assignment]


def _recipe(folder: Path, clients: int) -> Recipe:
    plain = tree(folder)
    plain["data"].pop("partition")
    plain["data"]["source"] = {"name": "tasks"}
    changes = {
        "data": {"source": {"rows_per_category": 2000, "categories": ["units", "sorting"]}, "clients": clients},
        "trainer": {"optimizer": "sgd", "clip_norm": None},
        "algorithm": "scaffold",
        "sampler": {"count": COHORT},
        "rounds": ROUNDS,
        "checkpoint": {"keep": 1},
        "transforms": [{"name": "clip", "norm": 1.0}],
        "evaluate": [],
    }
    return recipes.load(overlay(plain, changes)).resolved()


def _operations(call: Callable[[], None]) -> Counter[str]:
    """Count the byte codes that fedloom's own functions execute in a call."""
    counts: Counter[str] = Counter()

    def inside(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "opcode":
            counts[frame.f_code.co_qualname] += 1
        return inside

    def entered(frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        frame.f_trace_opcodes = True
        return inside

    before = sys.gettrace()
    sys.settrace(entered)
    try:
        call()
    finally:
        sys.settrace(before)
    return counts


def _cost(recipe: Recipe, folder: Path) -> Counter[str]:
    """Count the operations of the run's rounds."""
    folder.mkdir()
    world = World(recipe, folder, prepare(recipe, Sink()), Sink())
    zeros = lambda: Bundle({name: torch.zeros_like(t) for name, t in world.assets.initial.items()})
    crew, state, met = Idle({"params": zeros(), "control": zeros()}), world.start({}), set[str]()
    stage, split = world.engine.stage, world.assets.federation
    world.engine.stage = replace(stage, clients=WatchedDict(stage.clients))
    world.assets = replace(world.assets, federation=replace(split, clients=WatchedDict(split.clients)))
    world.clients = Watched(world.clients)

    def rounds() -> None:
        nonlocal state
        while state.round < recipe.rounds and not world.stopped(state):
            cohort = recipe.sampler.cohort(state.round, world.clients, recipe.seed)
            met.update(cohort)
            state, report = world.engine.round(crew, state, cohort)
            world.after(state, report)

    counts = _operations(rounds)
    assert len(met) == ROUNDS * COHORT  # nobody twice, which would make a difference that is none
    return counts


def test_the_operations_of_a_round_do_not_grow_with_clients_that_are_not_sampled(
    tiny_folder: Path, tmp_path: Path
) -> None:
    few, many = (_cost(_recipe(tiny_folder, n), tmp_path / str(n)) for n in (400, 4000))
    assert few.total() > 1000
    assert many == few, {name: (few[name], many[name]) for name in few | many if few[name] != many[name]}
