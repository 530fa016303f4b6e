"""A run may be interrupted at any moment, even while it saves: going on gives what it would have given.

Moments are the run's own events and every change of a file in its folder. A forked process is killed, or a person's
Ctrl-C arrives, just before one of them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import lines, run, tree

import fedloom
from fedloom.tracking import Event, Sink

CHANGES: dict[str, Any] = {
    "algorithm": "scaffold",
    "trainer": {"optimizer": "sgd", "clip_norm": None},
    "sampler": {"count": 2},
    "rounds": 3,
    "checkpoint": {"every": 2, "keep": 1},
    "compare": ["local"],
}
SAME = ("adapter_sha256", "metrics", "best_round", "bytes_up", "bytes_down", "trained_tokens", "participations")
WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "shutil.rmtree"}
KILLED = [  # what is about to happen, and for the how manieth time
    ("os.rename .*/checkpoints/.0.*.tmp$", 1),
    ("os.rename .*/memories/client-3/.2", 1),
    ("open .*/memories/index.jsonl", 2),
    ("Evaluated", 3),
    ("os.rename .*/.state.safetensors", 3),
    ("os.rename .*/.latest", 3),
    ("os.rename .*/.best", 2),
    ("shutil.rmtree .*/adapter$", 1),
    ("open .*/regimes/local/memories/index.jsonl", 1),
]
INTERRUPTED = [
    ("open .*/metrics.jsonl", 1),
    ("Step", 7),
    ("open .*/memories/index.jsonl", 2),
    ("RoundReport", 2),
    ("Evaluated", 4),
    ("os.rename .*/checkpoints/.2.*.tmp$", 1),
    ("os.rename .*/.best", 2),
    ("Finished", 1),
]
Blow = Callable[[], None]


class Watch(Sink):
    """Strikes just before the `count`-th moment that matches `pattern`."""

    running: Watch | None = None

    def __init__(self, folder: Path, pattern: str, count: int, blow: Blow) -> None:
        self.folder, self.pattern, self.left, self.blow = str(folder), re.compile(pattern), count, blow

    def on(self, event: Event) -> None:
        self.see(type(event).__name__)

    def see(self, moment: str) -> None:
        self.left -= bool(self.pattern.match(moment))
        if self.left == 0:
            self.left = -1
            self.blow()

    def run(self, recipe: Mapping[str, Any]) -> None:
        Watch.running = self
        try:
            fedloom.run(recipe, out=self.folder, sink=self)
        finally:
            Watch.running = None


def _file_moment(name: str, arguments: tuple[Any, ...]) -> None:
    if (watch := Watch.running) is None or name not in WATCHED or not str(arguments[0]).startswith(watch.folder):
        return
    if name != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR):
        watch.see(f"{name} {arguments[0]}")


sys.addaudithook(_file_moment)  # it cannot be taken away, and does nothing while no watch is running


def _kill(recipe: Mapping[str, Any], folder: Path, moment: tuple[str, int]) -> None:
    child = os.fork()
    if child == 0:
        try:
            Watch(folder, *moment, lambda: os.kill(os.getpid(), signal.SIGKILL)).run(recipe)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, moment


def _interrupt(recipe: Mapping[str, Any], folder: Path, moment: tuple[str, int]) -> None:
    with pytest.raises(KeyboardInterrupt):
        Watch(folder, *moment, lambda: signal.raise_signal(signal.SIGINT)).run(recipe)


def _traces(folder: Path) -> list[Any]:
    """Return what a run leaves, times aside: metrics lines, best checkpoint, private memories, torn files."""
    found: list[Any] = [[(x["round"], x["client"], x["name"]) for x in lines(folder / "metrics.jsonl")]]
    found += [(folder / "checkpoints" / "best").readlink().name]
    found += [p.read_bytes() for p in sorted((folder / "memories").glob("*/3.safetensors"))]
    return [*found, list(folder.rglob("*.tmp"))]


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the run that nobody interrupts."""
    return run(tiny_folder, tmp_path_factory.mktemp("whole") / "run", **CHANGES).folder


@pytest.mark.parametrize(("strike", "moment"), [*product([_kill], KILLED), *product([_interrupt], INTERRUPTED)])
def test_interrupted_anywhere_and_resumed_equals_whole(
    tiny_folder: Path, tmp_path: Path, whole: Path, moment: tuple[str, int], strike: Callable[..., None]
) -> None:
    folder = tmp_path / "run"
    strike(tree(tiny_folder, **CHANGES), folder, moment)
    resumed, expected = fedloom.resume(folder).summary, json.loads((whole / "summary.json").read_text())
    assert {key: resumed[key] for key in SAME} == {key: expected[key] for key in SAME}
    for regime in (".", "regimes/local"):
        assert _traces(folder / regime) == _traces(whole / regime), regime


def test_killed_before_the_recipe_was_written_starts_again(tiny_folder: Path, tmp_path: Path, whole: Path) -> None:
    recipe, folder = tree(tiny_folder, **CHANGES), tmp_path / "run"
    _kill(recipe, folder, ("os.rename .*recipe.yaml", 1))
    again = fedloom.run(recipe, out=folder)
    assert again.summary["adapter_sha256"] == json.loads((whole / "summary.json").read_text())["adapter_sha256"]
