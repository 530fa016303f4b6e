"""Worker processes give what one process gives, bit for bit, whatever happens to them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tests.helpers import lines, run, tree
from tests.laws import unfit

import fedloom
from fedloom import recipe as recipes
from fedloom.assets import prepare
from fedloom.runtime import pipes
from fedloom.runtime.engine import Engine, Errand, Errands, Reply
from fedloom.runtime.local import LocalCrew
from fedloom.runtime.processes import ProcessesCrew, ProcessesRuntime
from fedloom.runtime.spill import Spill
from fedloom.runtime.team import Team, Worker
from fedloom.tracking import Event, Phase, Sink, Step, Warned
from fedloom.types import Bundle, DataError, RecipeError, SiteError, Stopped
from fedloom.wire import codec
from fedloom.world import World

assert unfit  # registers its part
SGD = {"optimizer": "sgd", "clip_norm": None}
FIVE = {"data": {"clients": 5, "partition": "iid"}}
TIMES = {"seconds", "fit_seconds", "score_seconds", "tokens_per_second"}


def _runtime(**more: Any) -> dict[str, Any]:
    return {"name": "processes", "workers": 2, "threads": 1, "cohort": 1, **more}


def _workers(process: int | None = None) -> list[psutil.Process]:
    """Return the worker processes of a process."""
    found = []
    for child in psutil.Process(process).children(recursive=True):
        try:
            if any("fedloom.runtime.worker" in word for word in child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return [one for one in found if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def _kill(*which: int) -> None:
    workers = _workers()
    for i in which:
        workers[i].kill()


def _vanish(workers: Iterable[psutil.Process]) -> bool:
    """Return whether all end by themselves within some seconds."""
    _, alive = psutil.wait_procs(list(workers), timeout=20)
    return not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


class Watch(Sink):
    """Keeps the events, and does something at the first step of a round."""

    def __init__(self, round_: int = 0, blow: Callable[[], None] | None = None) -> None:
        self.events: list[Event] = []
        self.round, self.blow, self.at = round_, blow, 0

    def on(self, event: Event) -> None:
        self.events.append(event)
        self.at += isinstance(event, fedloom.tracking.RoundReport)
        if isinstance(event, Step) and self.at == self.round and self.blow is not None:
            blow, self.blow = self.blow, None
            blow()

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def _figures(folder: Path) -> list[tuple[int, str | None, str, float]]:
    found = [(one["round"], one["client"], one["name"], one["value"]) for one in lines(folder / "metrics.jsonl")]
    return [one for one in found if one[2] not in TIMES]


@pytest.mark.parametrize(
    ("cohort", "changes"),
    [
        (1, {"transforms": [{"name": "clip", "norm": 0.05}], "compare": ["local"]}),
        (2, {"algorithm": "scaffold", "trainer": SGD, "adapter": {"dropout": 0.1}, "model": {"dtype": "bf16"}}),
        # merges into the base reach the workers, also as a dense entry; clients have ranks of their own
        (2, {"algorithm": "flora", "adapter": {"r": 4, "ranks": [2, 4]}, "sampler": {"count": 4}}),
        # what clients do beside training is in what workers tell, and counts once where they do it at the same time
        (1, {"algorithm": {"name": "qfedavg", "lipschitz": 1}}),
    ],
)
def test_local_equals_processes(tiny_folder: Path, tmp_path: Path, cohort: int, changes: dict[str, Any]) -> None:
    changes, watch = {**FIVE, **changes, "rounds": 3}, Watch()
    one = run(tiny_folder, tmp_path / "a", f"runtime.cohort={cohort}", **changes)
    both = fedloom.run(tree(tiny_folder, **changes, runtime=_runtime(cohort=cohort)), out=tmp_path / "b", sink=watch)
    for key in ("adapter_sha256", "metrics", "bytes_up", "bytes_down", "trained_tokens", "train_loss_last"):
        assert both.summary[key] == one.summary[key], key
    for place in (Path(), *(Path("regimes") / name for name in changes.get("compare", ()))):
        assert _figures(tmp_path / "b" / place) == _figures(tmp_path / "a" / place)
    regimes = 1 + len(changes.get("compare", ()))
    assert watch.events.count(Phase("starting 2 worker processes")) == regimes
    cohort_size = changes.get("sampler", {}).get("count", 5)
    assert len(watch.of(Step)) == regimes * 3 * cohort_size * 2  # every step of every client in every round
    assert 0 < both.summary["fit_seconds"] <= both.summary["round_seconds"]
    assert both.summary["score_seconds"] + both.summary["fit_seconds"] <= both.summary["round_seconds"]
    assert not _workers()


class Inline(Worker):
    """A worker in this process: it trains at once what it is told, and answers through a pipe."""

    def __init__(self, engine: Engine, order: list[int]) -> None:
        self.name, self.ready, self.fate, self.engine, self.order = "inline", True, "", engine, order
        self.pipe, self.theirs = multiprocessing.Pipe()

    def say(self, frame: pipes.Frame) -> None:
        self.order.append(frame.head["chunk"])
        replies = self.engine.train(frame.head["round"], pipes.errands(frame))
        self.theirs.send_bytes(pipes.pack(pipes.done(frame.head["chunk"], replies)))

    def is_ready(self) -> None:
        self.ready = True

    def gone(self, seconds: float) -> bool:
        return True

    def end(self) -> str:
        return self.name


def test_the_largest_chunk_goes_first_and_replies_keep_the_order(tiny_folder: Path, tmp_path: Path) -> None:
    data = {"clients": 5, "partition": {"name": "quantity", "exponent": 0.8}}
    recipe = recipes.load(
        tree(tiny_folder, data=data, runtime=_runtime(), trainer={"epochs": 1}), ["trainer.steps=null"]
    )
    world = World(recipe, tmp_path, prepare(recipe, Sink()), Sink())
    crew, engine, order = world.crew, world.engine, list[int]()
    assert isinstance(crew, ProcessesCrew)
    crew.teams = [Team(str(i), [Inline(engine, order)]) for i in range(2)]
    state = recipe.algorithm.init(world.assets.initial)
    message = codec.encode(recipe.algorithm.broadcast(engine.stage.server, state, "").groups)
    errands = Errands(world.clients, lambda name: Errand(name, message, {}))
    told = list(crew.replies(0, errands))
    expected = list(LocalCrew(engine, 1).replies(0, errands))
    timeless = lambda metrics: {name: value for name, value in metrics.items() if name not in TIMES}
    key = lambda reply: (reply.client, reply.message, timeless(reply.metrics), reply.weight, reply.bytes_down)
    assert [key(reply) for reply in told] == [key(reply) for reply in expected]
    sizes = [reply.metrics["tokens"] for reply in expected]
    assert order == sorted(range(5), key=lambda i: -sizes[i]) != list(range(5))


def test_a_worker_that_has_read_other_rows_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    def world(**changes: Any) -> World:
        recipe = recipes.load(tree(tiny_folder, runtime=_runtime(), **changes))
        return World(recipe, tmp_path, prepare(recipe, Sink()), Sink())

    ours, same, other = world(), world(), world(seed=1)
    crew, worker = ours.crew, Inline(ours.engine, [])
    assert isinstance(crew, ProcessesCrew)
    crew.teams, worker.ready = [Team("inline", [worker])], False
    say = lambda stage: worker.theirs.send_bytes(
        pipes.pack(pipes.Frame("ready", {"fingerprint": pipes.fingerprint(stage)}))
    )
    say(other.engine.stage)
    with pytest.raises(SiteError, match="inline has read other rows"):
        crew.ready()
    say(same.engine.stage)
    crew.ready()
    assert worker.ready


def test_a_worker_that_is_killed_leaves_its_clients_to_another(tiny_folder: Path, tmp_path: Path) -> None:
    changes = {**FIVE, "algorithm": "scaffold", "trainer": {**SGD, "steps": 30}}
    one = run(tiny_folder, tmp_path / "a", "runtime.cohort=1", **changes)
    watch = Watch(1, lambda: _kill(0))
    both = fedloom.run(tree(tiny_folder, **changes, runtime=_runtime()), out=tmp_path / "b", sink=watch)
    assert both.summary["adapter_sha256"] == one.summary["adapter_sha256"]
    assert _figures(tmp_path / "b") == _figures(tmp_path / "a")
    (warned,) = watch.of(Warned)
    assert "round 2: worker 1 of 2 was killed by SIGKILL" in warned.text
    assert "another trains client-" in warned.text
    assert "last words" not in warned.text  # it had none: what libraries wrote before it was ready does not count


def test_without_workers_the_run_stops_and_may_go_on_in_one_process(tiny_folder: Path, tmp_path: Path) -> None:
    changes = {**FIVE, "rounds": 3, "trainer": {"steps": 30}}
    one = run(tiny_folder, tmp_path / "a", "runtime.cohort=1", **changes)
    watch = Watch(1, lambda: _kill(0, 1))
    with pytest.raises(Stopped, match=r"round 2: no worker process is left: .*SIGKILL") as caught:
        fedloom.run(tree(tiny_folder, **changes, runtime=_runtime()), out=tmp_path / "b", sink=watch)
    assert f"fedloom run --resume {tmp_path / 'b'} runtime.workers=1" in str(caught.value)
    assert (tmp_path / "b" / "checkpoints" / "latest").resolve().name == "1"
    with pytest.raises(RecipeError, match=r"runtime cannot change.*same reference, threads and cohort"):
        fedloom.resume(tmp_path / "b", ["runtime.cohort=2"])
    resumed = fedloom.resume(tmp_path / "b", ["runtime={name: local, threads: 1, cohort: 1}"])
    assert resumed.summary["adapter_sha256"] == one.summary["adapter_sha256"]
    longer = fedloom.resume(tmp_path / "b", ["runtime.name=processes", "runtime.workers=2", "rounds=+1"])
    one_longer = fedloom.resume(tmp_path / "a", ["rounds=+1"])
    assert longer.summary["adapter_sha256"] == one_longer.summary["adapter_sha256"]


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_run(tiny_folder: Path, tmp_path: Path, blow: signal.Signals) -> None:
    """The run is killed, or a person's Ctrl-C reaches all processes of the terminal, in the middle of a round."""
    recipe, out = tmp_path / "long.yaml", tmp_path / "cut"
    recipe.write_text(yaml.safe_dump(tree(tiny_folder, rounds=3, trainer={"steps": 40}, runtime=_runtime())))
    code = "from fedloom.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", str(recipe), "--out", str(out)],
        env={**os.environ},
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "1").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    workers = _workers(process.pid)
    assert len(workers) == 2
    if blow == signal.SIGINT:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.kill()
    _, told = process.communicate(timeout=60)
    assert _vanish(workers)
    assert process.returncode == (130 if blow == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in told
    if blow == signal.SIGINT:
        assert "the state is saved" in told
        whole = run(tiny_folder, tmp_path / "whole", "runtime.cohort=1", rounds=3, trainer={"steps": 40})
        here = "runtime={name: local, threads: 1, cohort: 1}"
        assert fedloom.resume(out, [here]).summary["adapter_sha256"] == whole.summary["adapter_sha256"]


@pytest.mark.parametrize(
    ("what", "told"),
    [("import", "ImportError: no module named 'flash_attention_5'"), ("killed", "CUDA error: device-side assert")],
)
def test_a_worker_that_cannot_start_says_why(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, told: str
) -> None:
    monkeypatch.setenv("UNFIT", what)
    with pytest.raises(SiteError, match=r"could not get ready: worker . of 2") as caught:
        run(tiny_folder, tmp_path / "a", runtime=_runtime(), transforms=["unfit"])
    assert told in str(caught.value)
    assert "lower runtime.workers, or use runtime=local" in str(caught.value)
    assert not _workers()


def test_what_training_raises_is_raised_here(tiny_folder: Path, tmp_path: Path) -> None:
    unfit_at = lambda kind: [{"name": "unfit", "raises": kind}]
    with pytest.raises(
        RuntimeError, match=r"(?s)worker . of 2, training client-2: ValueError: row 7 is odd.*in encode"
    ):
        run(tiny_folder, tmp_path / "a", runtime=_runtime(), transforms=unfit_at("ValueError"))
    with pytest.raises(DataError, match="worker 1 of 1, training client-1, client-2, client-3: row 7 is odd"):
        runtime = _runtime(workers=1, shard=2, cohort=3)
        run(tiny_folder, tmp_path / "b", runtime=runtime, transforms=unfit_at("DataError"))
    assert not _workers()


def test_out_of_memory_stops_the_run_with_its_state_saved(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = recipes.load(tree(tiny_folder, runtime=_runtime(), model={"attention": "sdpa", "dtype": "fp32"}))
    world = World(recipe, tmp_path / "regimes" / "local", prepare(recipe, Sink()), Sink())
    assert isinstance(world.crew, ProcessesCrew)
    told = {"type": "OutOfMemoryError", "text": "CUDA out of memory", "trace": "", "for_people": False}
    raised = world.crew._raised(4, Team("worker 1 of 2", clients=["client-3"]), told)
    assert isinstance(raised, Stopped)
    assert f"--resume {tmp_path}" in str(raised)
    assert "round 5: worker 1 of 2, training client-3: out of memory" in str(raised)


def test_a_model_cut_in_two_gives_the_same_bits(tiny_folder: Path, tmp_path: Path) -> None:
    changes = {**FIVE, "algorithm": "scaffold", "trainer": SGD}
    one = run(tiny_folder, tmp_path / "a", "runtime.cohort=2", **changes)
    both = run(tiny_folder, tmp_path / "b", runtime=_runtime(workers=1, shard=2, cohort=2), **changes)
    assert both.summary["adapter_sha256"] == one.summary["adapter_sha256"]


def test_a_team_that_loses_a_process_is_lost(tiny_folder: Path, tmp_path: Path) -> None:
    watch = Watch(0, lambda: _kill(1))
    with pytest.raises(Stopped, match="worker 1 of 1, process 2 was killed by SIGKILL"):
        fedloom.run(
            tree(tiny_folder, runtime=_runtime(workers=1, shard=2), trainer={"steps": 60}),
            out=tmp_path / "a",
            sink=watch,
        )
    assert not _workers()


def test_no_worker_starts_where_none_is_needed(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(ProcessesCrew, "open", started.append)
    result = run(tiny_folder, tmp_path / "a", runtime=_runtime(cohort=3))  # all clients in one pass
    assert fedloom.resume(result.folder, ["evaluate=[]"]).summary["rounds"] == 2
    assert run(tiny_folder, tmp_path / "b", runtime=_runtime(), algorithm="centralized").summary["rounds"] == 2
    assert not started


def test_how_many_workers(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = lambda *texts, **runtime: recipes.load(tree(tiny_folder, runtime={"name": "processes", **runtime}), texts)
    lanes = lambda recipe: recipe.runtime.lanes(recipe)
    monkeypatch.setattr("fedloom.runtime.processes.cores", lambda: 16)
    assert lanes(load(threads=4)) == 4
    assert lanes(load(threads=16)) == 2
    assert lanes(load(threads=2, shard=4)) == 2
    assert lanes(load(workers=1)) == 1
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert lanes(load("model.device=cuda")) == 8
    assert lanes(load("model.device=cuda", shard=4)) == 2


def test_what_cannot_be_combined_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"runtime\.shard=2 cannot cut quantised weights"):
        recipes.load(tree(tiny_folder, runtime=_runtime(shard=2), model={"quantize": "int8"}))

    class Own(unfit.Unfit, name="own-of-a-script"):
        __module__ = "__main__"

    with pytest.raises(RecipeError, match="Own is defined in the script that runs"):
        recipes.load(tree(tiny_folder, runtime=_runtime(), transforms=["own-of-a-script"]))
    del Own.known["own-of-a-script"]


def test_frames_keep_every_bit() -> None:
    import torch

    memory = {"control": Bundle({"a": torch.tensor([1.0, float("nan"), -0.0])}, {"x": 0.1 + 0.2}, {"t": "é"})}
    asked = pipes.unpack(
        pipes.pack(pipes.train(3, 7, [Errand("a", b"\x00\xff", memory), Errand("b", b"", {})], finish=False))
    )
    first, second = pipes.errands(asked)
    assert (asked.head["round"], first.client, first.message, second.message, second.memory) == (
        7,
        "a",
        b"\x00\xff",
        b"",
        {},
    )
    kept, sent = first.memory["control"], memory["control"]
    assert kept.tensors["a"].view(torch.int32).tolist() == sent.tensors["a"].view(torch.int32).tolist()
    assert (kept.scalars, kept.texts) == (sent.scalars, sent.texts)
    metrics = {"loss": float("inf"), "examples": 4, "lr": 1e-3, "fit_seconds": 0.75, "score_seconds": 0.25}
    told = [Reply("a", 1 / 3, b"x", metrics, None, 5), Reply("b", 2.0, b"", metrics, {}, 0)]
    frame = pipes.unpack(pipes.pack(pipes.done(3, told)))
    assert pipes.seconds(frame) == 2.0
    assert [(r.client, r.weight, r.message, r.metrics, r.memory, r.bytes_down) for r in pipes.replies(frame, 1.0)] == [
        ("a", 1 / 3, b"x", metrics, None, 5),
        ("b", 2.0, b"", metrics, {}, 0),
    ]
    assert [r.share for r in pipes.replies(frame, 0.5)] == [0.5, 0.5]


def test_early_replies_wait_on_the_disk(tmp_path: Path) -> None:
    frames = {i: pipes.Frame("done", {"chunk": i}, [bytes([i]) * 1000]) for i in range(4)}
    with Spill(tmp_path) as spill:
        for i in (2, 0, 3, 1):
            assert i not in spill
            spill.put(i, frames[i], float(i), now=i == 0)
        assert spill.file.seek(0, os.SEEK_END) > 3000
        for i in range(4):
            frame, share = spill.pop(i)
            assert (frame, share) == (frames[i], float(i))
        assert spill.file.seek(0, os.SEEK_END) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_runtime_is_a_part() -> None:
    runtime = recipes.load({"runtime": "processes"}).runtime
    assert isinstance(runtime, ProcessesRuntime)
    assert runtime.dump() == {
        "name": "processes",
        "reference": False,
        "threads": 1,
        "cohort": "auto",
        "workers": "auto",
        "shard": 1,
    }
