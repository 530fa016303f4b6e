"""Methods with several adapters a client: interrupted or not, in one pass or one after another, the end is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.algorithms.by_hand import close
from tests.algorithms.worlds import rounds, world
from tests.helpers import run

import fedloom
from fedloom.runtime.engine import Engine

PIT = {"name": "fedpit", "synthetic": 2, "attempts": 1, "max_new_tokens": 4, "temperature": 1.5}
METHODS: list[Any] = ["fedalt", "feddpa-t", {"name": "feddpa-f", "local_steps": 1}, {"name": "pf2lora", "rank": 1}, PIT]


@pytest.mark.parametrize("algorithm", METHODS, ids=lambda one: one if isinstance(one, str) else one["name"])
def test_resumed_equals_uninterrupted(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: Any
) -> None:
    changes = {"algorithm": algorithm, "rounds": 3, "evaluate": [], "adapter": {"dropout": 0.1}}
    changes |= {"sampler": {"count": 2}, "runtime": {"cohort": 1}}
    whole = run(tiny_folder, tmp_path / "a", **changes)
    real, fired = Engine.train, []

    def train(self: Engine, round_: int, errands: Any) -> Any:
        done = real(self, round_, errands)
        if round_ == 2 and not fired:
            fired.append(1)
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(Engine, "train", train)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_folder, tmp_path / "b", **changes)
    resumed = fedloom.resume(tmp_path / "b")
    for key in ("adapter_sha256", "bytes_up", "bytes_down", "trained_tokens", "train_loss_first", "train_loss_last"):
        assert resumed.summary[key] == whole.summary[key], key


@pytest.mark.parametrize("algorithm", ["fedalt", "feddpa-t", "pf2lora"])
def test_clients_in_one_pass_equal_one_after_another(tiny_folder: Path, tmp_path: Path, algorithm: str) -> None:
    """Also where one of them has a past and the others have none."""
    ends = []
    for cohort in (1, 3):
        of = world(tiny_folder, tmp_path / str(cohort), algorithm=algorithm, runtime={"cohort": cohort}, rounds=2)
        state = rounds(of, [of.clients[:1], ()])
        kept = [bundle.tensors for name in of.clients for bundle in of.memories.load(name).values()]
        ends.append([state.params, *(slot.tensors for slot in state.slots.values()), *kept])
    assert len(ends[0]) == len(ends[1]) > 3
    for one, other in zip(*ends, strict=True):
        close(one, other, 1e-10)
