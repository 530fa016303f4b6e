"""What methods share that train more than once in a round: several fits that follow each other, booked as one."""

from __future__ import annotations

from collections.abc import Sequence

from fedloom import tensors
from fedloom.types import Fitted, Tensors


def joined(fits: Sequence[Fitted]) -> Fitted:
    """Return fits that follow each other as one that ends where the last did; `lr` is the first one's that stepped."""
    stepped = [one for one in fits if one.steps] or list(fits)
    return Fitted(
        fits[-1].params,
        sum(one.steps for one in fits),
        stepped[0].lr,
        sum(one.examples for one in fits),
        sum(one.tokens for one in fits),
        tuple(loss for one in fits for loss in one.losses),
    )


def moved(start: Tensors, fitted: Fitted) -> Tensors:
    """Return what was trained, applied as a server would apply it, so that it equals local training bit for bit."""
    return tensors.add(start, tensors.sub(fitted.params, start))
