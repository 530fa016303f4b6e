"""The codec keeps every bit and refuses damage; transforms act on the change."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom import tensors
from fedloom.types import Bundle, ClientUpdate, Message, WireError
from fedloom.wire import codec
from fedloom.wire.transforms import Clip

NAMES = st.text(st.characters(blacklist_characters="/", blacklist_categories=["Cs"]), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(NAMES, st.floats(allow_nan=False), st.text(st.characters(blacklist_categories=["Cs"]), max_size=20))
def test_round_trip(group: str, scalar: float, text: str) -> None:
    values = {
        "a/b.c": torch.randn(3, 2),
        "half": torch.randn(2).bfloat16(),
        "n": torch.arange(3),
        "none": torch.zeros(0),
    }
    groups = {group: Bundle(values, {"x": scalar}, {"t": text}), "empty!": Bundle()}
    back = codec.decode(codec.encode(groups))
    assert back.keys() == groups.keys()
    assert back[group].scalars == {"x": scalar}
    assert back[group].texts == {"t": text}
    for name, t in values.items():
        assert torch.equal(back[group].tensors[name], t)
        assert back[group].tensors[name].dtype == t.dtype


def test_size_is_the_tensors_and_a_small_header() -> None:
    values = {f"layer.{i}": torch.zeros(100, 10) for i in range(20)}
    size = len(codec.encode({"params": Bundle(values)}))
    assert tensors.nbytes(values) < size < tensors.nbytes(values) + 20 * 120 + 400


@pytest.mark.parametrize(
    "spoil", [lambda d: d[:-3], lambda d: b"", lambda d: b"\x80\x04" + d, lambda d: d[:9] + b"x" + d[10:]]
)
def test_damage_is_refused(spoil: object) -> None:
    data = codec.encode({"params": Bundle({"w": torch.ones(4)})})
    with pytest.raises(WireError, match="not a fedloom message"):
        codec.decode(spoil(data))  # type: ignore[operator]


def test_reading_says_which_file(tmp_path: Path) -> None:
    with pytest.raises(WireError, match="is missing"):
        codec.read(tmp_path / "state.safetensors")
    (tmp_path / "x").write_bytes(b"nonsense")
    with pytest.raises(WireError, match=str(tmp_path / "x")):
        codec.read(tmp_path / "x")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    codec.write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(codec.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        codec.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_clip_bounds_the_joint_norm() -> None:
    update = ClientUpdate(
        "a", 1.0, Message({"params": Bundle({"x": torch.full((4,), 3.0), "y": torch.full((4,), 4.0)})})
    )
    clipped, _ = Clip(norm=1.0).encode(update, {}, torch.Generator())
    assert tensors.norm(clipped.message.groups["params"].tensors) == pytest.approx(1.0)
    assert clipped.metrics["update_norm"] == pytest.approx(10.0)
    kept, _ = Clip(norm=100.0).encode(update, {}, torch.Generator())
    assert kept.message == update.message
    assert math.isclose(tensors.norm(update.message.groups["params"].tensors), 10.0)


def test_clip_is_joint_over_all_changes_and_leaves_the_rest() -> None:
    groups = {
        name: Bundle({"x": torch.full((1,), 3.0 * k)}, {"s": 7.0}) for k, name in enumerate(("params", "b", "c"), 1)
    }
    update = ClientUpdate("a", 1.0, Message({**groups, "control": Bundle({"x": torch.full((1,), 50.0)})}))
    for changes, norm in ((("params", "b", "c"), 126**0.5), (("params", "c"), 90**0.5), (("params",), 3.0)):
        clipped, _ = Clip(norm=0.5).encode(replace(update, changes=changes), {}, torch.Generator())
        assert clipped.metrics["update_norm"] == pytest.approx(norm)
        assert clipped.changes == changes
        for name, bundle in update.message.groups.items():
            factor = 0.5 / norm if name in changes else 1.0
            torch.testing.assert_close(clipped.message.groups[name].tensors["x"], factor * bundle.tensors["x"])
            assert clipped.message.groups[name].scalars == bundle.scalars
    nothing = replace(update, message=Message({"control": groups["b"]}))
    assert Clip(norm=0.5).encode(nothing, {}, torch.Generator())[0] is nothing


def test_a_tensor_may_stand_in_two_groups() -> None:
    """One tensor in two groups, and two views of one buffer, are written twice."""
    buffer = torch.arange(6.0)
    groups = {"a": Bundle({"x": buffer, "y": buffer[2:5]}), "b": Bundle({"x": buffer})}
    back = codec.decode(codec.encode(groups))
    assert torch.equal(back["a"].tensors["x"], buffer)
    assert torch.equal(back["a"].tensors["y"], buffer[2:5])
    assert torch.equal(back["b"].tensors["x"], buffer)
