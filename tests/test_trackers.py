"""Trackers get the scalars of rounds and evaluations; one that fails is told once and stops nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import adapter, run, same, tree

import fedloom
from fedloom import trackers
from fedloom.trackers import Guarded
from fedloom.tracking import Event, Finished, Phase, Plan, RoundReport, Sink, Step, Tracker, Warned

NEEDS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
CALM = {"evaluate": ["loss"], "rounds": 1, "trainer": {"steps": 1}}


class Heard(Sink):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on(self, event: Event) -> None:
        self.events.append(event)

    @property
    def warnings(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Warned) and event.text.startswith("tracker")]


class Odd(Sink):
    """A sink that misbehaves in one place."""

    def __init__(self, where: str, folder: Path) -> None:
        self.where, self.folder, self.seen = where, folder, 0

    def on(self, event: Event) -> None:
        self.seen += 1
        if self.where == "log" and isinstance(event, RoundReport):
            raise ValueError("no such metric\nand more")
        if self.where == "full":
            with Path("/dev/full").open("w") as disk:
                disk.write("x" * 100_000)

    def __exit__(self, *_: Any) -> None:
        if self.where == "finish":
            sys.exit(3)
        if self.where == "hang":
            threading.Event().wait(30)


class OddTracker(Tracker):
    """Made a part of the family for the length of a test."""

    where: str = "open"

    def open(self, name: str, folder: Path, recipe: Mapping[str, Any]) -> Sink:
        if self.where == "open":
            raise ConnectionError("nobody there")
        return Odd(self.where, folder)


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(Tracker.known, "odd", OddTracker)
    monkeypatch.setattr(OddTracker, "part_name", "odd")
    return None


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("open", "ConnectionError: nobody there"),
        ("log", "ValueError: no such metric;"),
        ("full", "No space left on device"),
        ("finish", "SystemExit: 3"),
        ("hang", "has not ended after 0.3 s"),
    ],
)
def test_a_failing_tracker_is_told_once_and_the_run_is_the_same(
    tiny_folder: Path, tmp_path: Path, odd: None, monkeypatch: pytest.MonkeyPatch, where: str, words: str
) -> None:
    if where == "full" and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    if where == "hang":
        monkeypatch.setattr(Guarded.__init__, "__defaults__", (0.3,))
    heard = Heard()
    recipe = {**tree(tiny_folder, **CALM), "compare": ["local"], "trackers": [{"name": "odd", "where": where}]}
    result = fedloom.run(recipe, out=tmp_path / "a", sink=heard)
    (warning,) = heard.warnings
    assert words in warning
    assert "\n" not in warning
    plain = run(tiny_folder, tmp_path / "b", **CALM)
    assert same(adapter(result), adapter(plain))
    assert (result.folder / "summary.json").is_file()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("needs tensorboard: pip install 'fedloom[tensorboard]'")
    (tmp_path / "file").touch()
    heard, tracker = Heard(), trackers.TensorBoard()
    guard = Guarded(tracker, lambda: tracker.open("a", tmp_path / "file", {}), heard.on)
    guard.start()
    guard.__exit__(None, None, None)
    assert "NotADirectoryError" in heard.warnings[0]


def test_one_that_is_slow_to_open_gets_its_events_later() -> None:
    heard, kept, gate = Heard(), Heard(), threading.Event()

    def opener() -> Sink:
        gate.wait(10)
        return kept

    guard = Guarded(trackers.Wandb(), opener, heard.on, patience=0.1)
    guard.start()
    assert "tracker wandb: not open after 0.1 s" in heard.warnings[0]
    guard.on(Phase("one"))
    guard.on(Step("client-1", 3, 1.0))
    gate.set()
    time.sleep(0.2)
    guard.on(Finished({}))
    guard.__exit__(None, None, None)
    assert [type(event) for event in kept.events] == [Phase, Finished]
    assert len(heard.warnings) == 1


def test_one_that_cannot_keep_up_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "WAITING", 3)
    gate, heard = threading.Event(), Heard()

    class Slow(Sink):
        def on(self, event: Event) -> None:
            gate.wait(10)

    guard = Guarded(trackers.Wandb(), Slow, heard.on)
    guard.start()
    for _ in range(9):
        guard.on(Phase("x"))
    (warning,) = heard.warnings
    assert "tracker wandb is 3 events behind" in warning
    began = time.perf_counter()
    guard.__exit__(None, None, None)
    assert time.perf_counter() - began < 1
    gate.set()


def test_regimes_do_not_overlap_and_the_end_is_told() -> None:
    logged: list[tuple[str, int]] = []
    ended: list[bool] = []
    sink = trackers.Scalars(lambda values, round_: logged.extend((name, round_) for name in values), ended.append)
    report = RoundReport(1, 1, 2.0, {}, (), 10, 1, 5, 6, 1.0, 0.5)
    for regime in ("federated", "local"):
        sink.on(Plan("a", regime, Path(), (), 1, 0, 1, 1))
        sink.on(report)
    assert ("train/federated/loss", 1) in logged
    assert ("train/local/loss", 1) in logged
    assert len(set(logged)) == len(logged)
    sink.__exit__(None, None, None)
    sink.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert ended == [True, False]


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_a_missing_library_is_named(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    if importlib.util.find_spec(NEEDS[name]) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(fedloom.RecipeError, match=rf"pip install 'fedloom\[{name}\]'"):
        run(tiny_folder, tmp_path / "a", trackers=[name])


SCRIPT = """
import json, sys
import fedloom
result = fedloom.run(json.loads(sys.argv[1]), out=sys.argv[2])
print(json.dumps({"loss": result.metrics["federated"]["loss"]["loss"]}))
"""


def real(name: str, folder: Path, out: Path, **variables: str) -> float:
    """Run in a process of its own with a real library, and return the test loss: all that is on standard output."""
    if importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"needs {name}: pip install 'fedloom[{name}]'")
    recipe = {**tree(folder), "compare": ["local"], "trackers": [name]}
    words = [sys.executable, "-c", SCRIPT, json.dumps(recipe), str(out)]
    done = subprocess.run(
        words, env={**os.environ, **variables}, capture_output=True, text=True, check=True, timeout=120, cwd=out.parent
    )
    assert "goes on without it" not in done.stderr
    return float(json.loads(done.stdout)["loss"])


def test_tensorboard_for_real(tiny_folder: Path, tmp_path: Path) -> None:
    loss = real("tensorboard", tiny_folder, tmp_path / "a")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    events.Reload()
    assert events.Scalars("test/federated/loss/loss")[0].value == pytest.approx(loss, abs=1e-5)
    assert [one.step for one in events.Scalars("train/federated/loss")] == [1, 2]
    assert [one.step for one in events.Scalars("train/local/loss")] == [1, 2]


def test_mlflow_for_real(tiny_folder: Path, tmp_path: Path) -> None:
    uri = f"file://{tmp_path / 'ml'}"
    variables = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
    loss = real("mlflow", tiny_folder, tmp_path / "a", **variables)
    metric = next((tmp_path / "ml").rglob("metrics/test/federated/loss/loss"))
    _, value, step = metric.read_text().split()
    assert float(value) == pytest.approx(loss)
    assert step == "2"
    run_folder = next(folder for folder in metric.parents if (folder / "params").is_dir())
    assert (run_folder / "params" / "trainer.lr").read_text() == "0.01"
    assert "FINISHED" in (run_folder / "meta.yaml").read_text() or "status: 3" in (run_folder / "meta.yaml").read_text()


def test_wandb_for_real_offline(tiny_folder: Path, tmp_path: Path) -> None:
    loss = real("wandb", tiny_folder, tmp_path / "a", WANDB_MODE="offline", WANDB_SILENT="true")
    (log,) = (tmp_path / "a").rglob("*.wandb")
    raw = log.read_bytes()
    assert b"test/federated/loss/loss" in raw
    assert str(loss)[:8].encode() in raw
    assert b"train/local/loss" in raw


def test_trackio_for_real(tiny_folder: Path, tmp_path: Path) -> None:
    loss = real("trackio", tiny_folder, tmp_path / "a", TRACKIO_DIR=str(tmp_path / "t"), HF_HUB_OFFLINE="1")
    import sqlite3

    (base,) = (tmp_path / "t").rglob("*.db")
    rows = [json.loads(row[0]) for row in sqlite3.connect(base).execute("select metrics from metrics")]
    told = [row["test/federated/loss/loss"] for row in rows if "test/federated/loss/loss" in row]
    assert told == [pytest.approx(loss)]
    assert any("train/local/loss" in row for row in rows)
