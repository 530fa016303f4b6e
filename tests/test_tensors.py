"""Arithmetic on maps of tensors."""

from __future__ import annotations

import math

import pytest
import torch

from fedloom import tensors

A = {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([[3.0]])}
B = {"x": torch.tensor([10.0, 20.0]), "y": torch.tensor([[30.0]])}


def _values(a: tensors.Tensors) -> dict[str, list[float]]:
    return {name: t.flatten().tolist() for name, t in a.items()}


def test_arithmetic() -> None:
    assert _values(tensors.add(A, B)) == {"x": [11, 22], "y": [33]}
    assert _values(tensors.add(A, B, alpha=-0.5)) == {"x": [-4, -8], "y": [-12]}
    assert _values(tensors.sub(B, A)) == {"x": [9, 18], "y": [27]}
    assert _values(tensors.scale(A, 2.0)) == {"x": [2, 4], "y": [6]}
    assert _values(tensors.zeros_like(A)) == {"x": [0, 0], "y": [0]}
    assert float(tensors.sq_dist(A, B)) == 81 + 324 + 729
    assert tensors.norm(A) == pytest.approx(math.sqrt(14))
    assert tensors.norm({}) == 0.0
    assert (tensors.numel(A), tensors.nbytes(A)) == (3, 12)
    assert _values(A) == {"x": [1, 2], "y": [3]}


@pytest.mark.parametrize("operation", [tensors.add, tensors.sub, tensors.sq_dist])
def test_other_names_are_refused(operation: object) -> None:
    with pytest.raises(ValueError, match=r"differ in 1 names, such as \['y'\]"):
        operation(A, {"x": B["x"]})  # type: ignore[operator]


def test_clone_shares_nothing() -> None:
    copy = tensors.clone(A)
    copy["x"].zero_()
    assert _values(A)["x"] == [1, 2]


def test_finite() -> None:
    assert tensors.finite(A)
    for bad in (math.nan, math.inf, -math.inf):
        assert not tensors.finite({**A, "z": torch.tensor([0.0, bad])})


def test_squared_distance_is_differentiable_in_both() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = torch.tensor([0.0, 5.0], requires_grad=True)
    tensors.sq_dist({"w": x}, {"w": y}).backward()
    assert x.grad is not None
    assert y.grad is not None
    assert x.grad.tolist() == [2.0, -6.0]
    assert y.grad.tolist() == [-2.0, 6.0]


def test_norm_rises_to_float64_and_ignores_order() -> None:
    stream = torch.Generator().manual_seed(0)
    values = [(f"{i}", torch.randn(7, generator=stream)) for i in range(40)]
    found = {tensors.norm(dict(values[i:] + values[:i])) for i in range(40)}
    assert len(found) == 1
    assert found.pop() == pytest.approx(float(torch.cat([t for _, t in values]).double().norm()), rel=1e-14)
    assert tensors.norm({"w": torch.full((10,), 300.0, dtype=torch.float16)}) == pytest.approx(300 * math.sqrt(10))
