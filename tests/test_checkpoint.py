"""Checkpoints and memories: what is written is read, what is torn is ignored, what is old goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedloom.checkpoint import Checkpoints, MemoryStore
from fedloom.types import Bundle, Memory, ServerState, Stopped, WireError


def _state(round_: int) -> ServerState:
    slots = {"control": Bundle({"w": torch.full((2,), -1.0)}, {"x": 0.1}, {"t": "text"})}
    return ServerState(round_, {"w": torch.full((2,), float(round_))}, slots)


def _memory(value: float) -> Memory:
    return {"own": Bundle({"w": torch.tensor([value])})}


def _value(store: MemoryStore, client: str) -> float | None:
    memory = store.load(client)
    return float(memory["own"].tensors["w"]) if memory else None


def test_state_and_record_come_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.find("latest") is None
    checkpoints.save(_state(3), {"books": {"loss": float("inf")}})
    state, record = checkpoints.load(3)
    assert (state.round, checkpoints.find("latest"), record["books"]) == (3, 3, {"loss": float("inf")})
    assert torch.equal(state.params["w"], _state(3).params["w"])
    assert state.slots["control"].scalars == {"x": 0.1}
    assert state.slots["control"].texts == {"t": "text"}


def test_old_checkpoints_go_and_damaged_ones_are_named(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for round_ in range(5):
        checkpoints.save(_state(round_), {})
    assert checkpoints.rounds() == [3, 4]
    (tmp_path / "4" / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(WireError, match=r"4/state\.safetensors"):
        checkpoints.load(4)
    with pytest.raises(WireError, match=r"9/state\.json"):
        checkpoints.load(9)


def test_a_refused_write_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(_state(0), {})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(Stopped, match="checkpoint of round 0 is intact; make room") as caught:
        checkpoints.save(_state(1), {})
    assert caught.value.exit_status == 3
    assert checkpoints.find("latest") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"0", "latest"}


def test_memories_count_once_they_are_committed(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    assert _value(store, "a") is None
    store.save("a", 1, _memory(1.0))
    assert _value(store, "a") is None
    assert store.commit(1) == ["a"]
    assert _value(store, "a") == 1.0
    assert store.commit(2) == []


def test_restoring_goes_back_and_ignores_a_torn_line(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    for round_, clients in ((1, "ab"), (2, "a"), (3, "b")):
        for client in clients:
            store.save(client, round_, _memory(round_))
        store.commit(round_)
    with (tmp_path / "index.jsonl").open("a") as file:
        file.write('{"round": 4, "cli')
    fresh = MemoryStore(tmp_path)
    fresh.restore(2)
    assert (_value(fresh, "a"), _value(fresh, "b")) == (2.0, 1.0)
    assert len((tmp_path / "index.jsonl").read_text().splitlines()) == 2
    fresh.restore(0)
    assert _value(fresh, "a") is None
    assert not (tmp_path / "index.jsonl").exists()


def test_pruning_keeps_what_any_kept_checkpoint_needs(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    for round_ in range(1, 7):
        store.save("a", round_, _memory(round_))
        store.commit(round_)
    store.prune([3, 5], ["a"])
    assert sorted(p.stem for p in (tmp_path / "a").iterdir()) == ["3", "5", "6"]
    for kept, value in ((3, 3.0), (5, 5.0)):
        other = MemoryStore(tmp_path)
        other.look_at(kept)
        assert _value(other, "a") == value
