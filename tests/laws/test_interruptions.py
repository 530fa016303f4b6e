"""Whatever interrupts a run, going on ends in the same adapter, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.helpers import lines, run, tree

import fedloom
from fedloom.algorithms.fedavg import FedAvg
from fedloom.runtime.engine import Engine
from fedloom.types import RecipeError, Stopped

SGD = {"optimizer": "sgd", "clip_norm": None}


def _cut(monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    """Interrupt the next run in the middle of the round after `rounds`, once."""
    real, seen = Engine.train, {"fired": False}

    def train(self: Engine, round_: int, errands: Any) -> Any:
        if round_ == rounds and errands[-1].client != "client-1" and not seen["fired"]:
            seen["fired"] = True
            raise KeyboardInterrupt
        return real(self, round_, errands)

    monkeypatch.setattr(Engine, "train", train)


@pytest.mark.parametrize(("algorithm", "trainer"), [("fedavg", {}), ("scaffold", SGD), ("local", {})])
@pytest.mark.parametrize(("rounds", "cohort"), [(0, 1), (2, 1), (2, 2)])
def test_resumed_equals_uninterrupted(  # noqa: PLR0917
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    algorithm: str,
    trainer: dict[str, Any],
    rounds: int,
    cohort: int,
) -> None:
    changes = {"algorithm": algorithm, "trainer": trainer, "rounds": 4, "adapter": {"dropout": 0.1}}
    changes["runtime"] = {"cohort": cohort}
    whole = run(tiny_folder, tmp_path / "a", **changes)
    _cut(monkeypatch, rounds)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_folder, tmp_path / "b", **changes)
    resumed = fedloom.resume(tmp_path / "b")
    assert resumed.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    for key in ("bytes_up", "trained_tokens", "participations", "train_loss_first", "train_loss_last", "metrics"):
        assert resumed.summary[key] == whole.summary[key], key
    keys = lambda path: [(line["round"], line["client"], line["name"]) for line in lines(path / "metrics.jsonl")]
    assert keys(tmp_path / "a") == keys(tmp_path / "b")


def test_memories_survive_between_sparse_checkpoints(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "algorithm": "scaffold",
        "trainer": SGD,
        "rounds": 6,
        "checkpoint": {"every": 4},
        "sampler": {"count": 2},
    }
    whole = run(tiny_folder, tmp_path / "a", **changes)
    _cut(monkeypatch, 5)
    try:
        run(tiny_folder, tmp_path / "b", **changes)
    except KeyboardInterrupt:
        fedloom.resume(tmp_path / "b")
    again = fedloom.resume(tmp_path / "b")
    assert again.summary["adapter_sha256"] == whole.summary["adapter_sha256"]


def test_going_on_longer_equals_a_longer_run(tiny_folder: Path, tmp_path: Path) -> None:
    longer = run(tiny_folder, tmp_path / "a", rounds=4)
    short = run(tiny_folder, tmp_path / "b", rounds=2)
    extended = fedloom.resume(short.folder, ["rounds=+2"])
    assert extended.summary["rounds"] == 4
    assert extended.summary["adapter_sha256"] == longer.summary["adapter_sha256"]


def test_a_finished_run_is_not_run_again(tiny_folder: Path, tmp_path: Path) -> None:
    first = run(tiny_folder, tmp_path / "a")
    stamp = (first.folder / "summary.json").stat().st_mtime_ns
    assert fedloom.resume(first.folder).summary == first.summary
    assert (first.folder / "summary.json").stat().st_mtime_ns == stamp


def test_resume_refuses_other_keys_and_other_folders(tiny_folder: Path, tmp_path: Path) -> None:
    run(tiny_folder, tmp_path / "a")
    with pytest.raises(RecipeError, match=r"trainer cannot change .*rounds"):
        fedloom.resume(tmp_path / "a", ["trainer.lr=0.5"])
    with pytest.raises(RecipeError, match="no run folder"):
        fedloom.resume(tmp_path)
    with pytest.raises(RecipeError, match="2 rounds are done"):
        fedloom.resume(tmp_path / "a", ["rounds=1"])


def test_a_run_folder_is_not_overwritten_unasked(tiny_folder: Path, tmp_path: Path) -> None:
    run(tiny_folder, tmp_path / "a", rounds=1)
    with pytest.raises(RecipeError, match=r"--resume .* --overwrite"):
        run(tiny_folder, tmp_path / "a")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(RecipeError, match="no run folder"):
        fedloom.run(tree(tiny_folder), out=tmp_path / "other", overwrite=True)
    assert (tmp_path / "other" / "thesis.txt").exists()
    again = fedloom.run(tree(tiny_folder, rounds=1), out=tmp_path / "a", overwrite=True)
    assert again.summary["rounds"] == 1


def test_start_from_an_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    first = run(tiny_folder, tmp_path / "a")
    second = run(tiny_folder, tmp_path / "b", init=str(first.adapter))
    assert second.metrics["base"]["loss"]["loss"] == first.metrics["base"]["loss"]["loss"]
    assert second.summary["train_loss_first"] < first.summary["train_loss_first"]


def _spoil(monkeypatch: pytest.MonkeyPatch, *clients: str) -> None:
    """Make the loss of some clients NaN, as a broken row or a too high learning rate would."""
    real = FedAvg.train

    def train(self: FedAvg, client: Any, message: Any) -> Any:
        update, memory = yield from real(self, client, message)
        if client.name in clients:
            for t in update.message.groups["params"].tensors.values():
                t.fill_(float("nan"))
        return update, memory

    monkeypatch.setattr(FedAvg, "train", train)


def test_a_client_that_is_not_finite_is_rejected_and_recorded(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _spoil(monkeypatch, "client-2")
    result = run(tiny_folder, tmp_path / "a")
    assert result.summary["rejected"] == 2
    assert result.summary["participations"] == 4
    recorded = [x for x in lines(result.folder / "metrics.jsonl") if x["name"] == "rejected" and x["value"]]
    assert [(x["round"], x["client"]) for x in recorded] == [(1, "client-2"), (2, "client-2")]


def test_a_round_without_a_finite_update_stops_with_the_state_saved(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tiny_folder, tmp_path / "a")
    with monkeypatch.context() as patch:
        _spoil(patch, "client-1", "client-2", "client-3")
        with pytest.raises(Stopped, match="client-1, client-2, client-3") as caught:
            run(tiny_folder, tmp_path / "b")
    assert caught.value.exit_status == 3
    assert fedloom.resume(tmp_path / "b").summary["adapter_sha256"] == whole.summary["adapter_sha256"]


def test_a_diverging_run_stops(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = {"optimizer": "sgd", "lr": 1e30, "clip_norm": None, "steps": 4}
    with pytest.raises(Stopped, match="no client returned a finite loss"):
        run(tiny_folder, tmp_path / "a", trainer=trainer)


def _command(recipe: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        "from fedloom.cli.main import main; main()",
        "run",
        *more,
        str(recipe),
        "--out",
        str(out),
    ]


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_killed_processes_go_on(tiny_folder: Path, tmp_path: Path, blow: signal.Signals) -> None:
    """A real process is killed in mid-round, at moments that it does not choose, until it has nothing left to do."""
    recipe = tmp_path / "long.yaml"
    recipe.write_text(yaml.safe_dump(tree(tiny_folder, rounds=12, trainer={"steps": 6})))
    whole = fedloom.run(str(recipe), out=tmp_path / "whole")
    process = subprocess.Popen(
        _command(recipe, tmp_path / "cut"), env={**os.environ}, stderr=subprocess.PIPE, text=True
    )
    started, deadline = tmp_path / "cut" / "checkpoints" / "3", time.monotonic() + 120
    while not started.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(blow)
    _, told = process.communicate(timeout=60)
    assert process.returncode == (130 if blow == signal.SIGINT else -signal.SIGKILL)
    if blow == signal.SIGINT:
        assert "--resume" in told
        assert "Traceback" not in told
    assert not (tmp_path / "cut" / "summary.json").exists()
    resumed = fedloom.resume(tmp_path / "cut")
    assert resumed.summary["adapter_sha256"] == whole.summary["adapter_sha256"]


def test_a_full_disk_leaves_the_last_checkpoint_valid(tiny_folder: Path, tmp_path: Path) -> None:
    """The run folder lies on a real file system that is too small for all checkpoints."""
    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        filler = small / "filler"
        result_folder = small / "run"
        changes = {"rounds": 3, "checkpoint": {"keep": 1}, "evaluate": []}
        run(tiny_folder, tmp_path / "whole", **changes)
        fedloom.run(tree(tiny_folder, **{**changes, "rounds": 1}), out=result_folder)
        free = os.statvfs(small)
        filler.write_bytes(b"x" * (free.f_bavail * free.f_frsize - 8192))
        with pytest.raises((Stopped, OSError)) as caught:
            fedloom.resume(result_folder, ["rounds=3"])
        assert isinstance(caught.value, Stopped), caught.value
        assert "make room" in str(caught.value)
        filler.unlink()
        resumed = fedloom.resume(result_folder)
        whole = fedloom.resume(tmp_path / "whole")
        assert resumed.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    finally:
        subprocess.run(["umount", str(small)], check=False)


def test_early_stop_and_best_ignore_what_is_not_finite(tiny_folder: Path, tmp_path: Path) -> None:
    changes = {
        "rounds": 8,
        "trainer": {"optimizer": "sgd", "lr": 1e-12, "clip_norm": None},
        "early_stop": {"evaluator": "loss", "patience": 2, "delta": 0.01},
    }
    result = run(tiny_folder, tmp_path / "a", **changes)
    assert result.summary["rounds"] == 3  # the first is the best, and two more do not improve on it
    assert (result.folder / "checkpoints" / "best").resolve().name == "1"


def test_an_adapter_of_another_scale_is_no_start(tiny_folder: Path, tmp_path: Path) -> None:
    first = run(tiny_folder, tmp_path / "a", rounds=1)
    with pytest.raises(fedloom.ModelError, match=r"lora_alpha is 4.*set adapter\.r"):
        run(tiny_folder, tmp_path / "b", init=str(first.adapter), adapter={"alpha": 8})


def test_a_loss_that_is_not_finite_enters_no_mean(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedloom.types import Bundle

    real = Engine.evaluate

    def evaluate(self: Engine, state: Any, name: str, split: Any) -> Bundle:
        sums = real(self, state, name, split)
        return Bundle(scalars={**sums.scalars, "nll": float("nan")}) if name == "client-2" else sums

    monkeypatch.setattr(Engine, "evaluate", evaluate)
    result = run(tiny_folder, tmp_path / "a")
    loss = result.metrics["federated"]["loss"]
    assert loss["loss"] is not None
    assert loss["loss_worst10"] is not None
    assert result.summary["best_round"] is None  # a state that cannot be measured whole is never the best
