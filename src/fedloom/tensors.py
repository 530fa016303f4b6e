"""Pure operations on name -> tensor maps. Every function that takes two maps requires the same names in both."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedloom.types import Tensors


def _check(a: Tensors, b: Tensors) -> None:
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise ValueError(f"tensor maps differ in {len(odd)} names, such as {odd[:3]}")


def add(a: Tensors, b: Tensors, alpha: float = 1.0) -> dict[str, Tensor]:
    """Return a + alpha * b."""
    _check(a, b)
    return {name: torch.add(a[name], b[name], alpha=alpha) for name in a}


def sub(a: Tensors, b: Tensors) -> dict[str, Tensor]:
    """Return a - b."""
    _check(a, b)
    return {name: a[name] - b[name] for name in a}


def scale(a: Tensors, factor: float) -> dict[str, Tensor]:
    """Return factor * a."""
    return {name: t * factor for name, t in a.items()}


def zeros_like(a: Tensors) -> dict[str, Tensor]:
    """Return zeros of the same names, shapes and dtypes."""
    return {name: torch.zeros_like(t) for name, t in a.items()}


def clone(a: Tensors) -> dict[str, Tensor]:
    """Return detached copies that share no storage with `a`."""
    return {name: t.detach().clone() for name, t in a.items()}


def sq_dist(a: Tensors, b: Tensors) -> Tensor:
    """Return the squared Euclidean distance over all tensors as a scalar; differentiable in both."""
    _check(a, b)
    return torch.stack([(a[name] - b[name].to(a[name].device)).square().sum() for name in a]).sum()


def norm(a: Tensors) -> float:
    """Return the joint Euclidean norm over all tensors, accumulated in float64; 0.0 for an empty map."""
    return math.sqrt(math.fsum(float(t.double().square().sum()) for t in a.values()))


def finite(a: Tensors) -> bool:
    """Return whether every element of every tensor is finite."""
    return all(bool(torch.isfinite(t).all()) for t in a.values())


def nbytes(a: Tensors) -> int:
    """Return the bytes that the elements take in memory."""
    return sum(t.numel() * t.element_size() for t in a.values())


def numel(a: Tensors) -> int:
    """Return the number of elements."""
    return sum(t.numel() for t in a.values())
