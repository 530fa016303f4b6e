"""Rules that shorten updates: norm bound and centred clipping.

Norm bound (Sun et al., arXiv 1911.07963):

    mean_k u_k min(1, C / ||u_k||) + N(0, sigma^2)

Centred clipping (Karimireddy et al., arXiv 2012.10333), from v, what it returned in the round before (0 at first):

    v <- v + mean_k (u_k - v) min(1, tau / ||u_k - v||)

Lengths are those of the shared weights; the factor of a client holds for all of its groups. Both ignore how many rows a
client has.

Differ from the papers in: C may be the median length of the cohort; the updates are changes of the weights after
several local steps, where centred clipping was studied on clients' momenta.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from fedloom import tensors
from fedloom.server.aggregate import Around, Slot, bundles, values, wide
from fedloom.server.robust.base import Robust, mean, shared, sq_apart, times
from fedloom.types import Bundle, ClientUpdate


class NormBound(Robust, name="norm-bound"):
    """The mean of updates that are no longer than a bound."""

    norm: PositiveFloat | None = None
    """C, the largest length; null: the median of the cohort's lengths."""
    noise: NonNegativeFloat = 0.0
    """sigma, standard deviation of the noise on the mean of the shared weights."""

    def rule(self, held: Sequence[ClientUpdate], around: Around) -> tuple[dict[str, Bundle], Bundle]:
        lengths = [tensors.norm(delta) for delta in shared(held)]
        most = median(lengths) if self.norm is None else self.norm
        short = [
            times(update, most / length) if length > most else update
            for update, length in zip(held, lengths, strict=True)
        ]
        groups = mean(short, [1.0] * len(short), around)
        if self.noise:
            groups["params"] = Bundle({n: self._noisy(t, around) for n, t in groups["params"].tensors.items()})
        return groups, Bundle()

    def _noisy(self, t: Tensor, around: Around) -> Tensor:
        drawn = torch.randn(t.shape, generator=around.stream, dtype=t.dtype)
        return t + self.noise * drawn.to(t.device)


class CenteredClipping(Robust, name="centered-clipping"):
    """The last result, moved by the mean of what the updates differ from it, each cut to a length."""

    remembers: ClassVar[bool] = True

    tau: PositiveFloat = 1.0
    """Largest distance from the centre that counts in full."""
    iterations: PositiveInt = 1
    """Steps a round."""

    def rule(self, held: Sequence[ClientUpdate], around: Around) -> tuple[dict[str, Bundle], Bundle]:
        every, deltas = [values(update) for update in held], shared(held)
        centre = {slot: _kept(around.kept, slot, wide(t)) for slot, t in every[0].items()}
        for _ in range(self.iterations):
            at = {slot.name: t for slot, t in centre.items() if slot.group == "params" and not slot.scalar}
            lengths = [math.sqrt(sq_apart(delta, at)) for delta in deltas]
            factors = [min(1.0, self.tau / length) if length else 1.0 for length in lengths]
            centre = {slot: _moved(t, [one[slot] for one in every], factors) for slot, t in centre.items()}
        return bundles(centre, held[0].message.groups), _keep(around.kept, centre)


def _moved(centre: Tensor, found: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    step = torch.zeros_like(centre)
    for k, (t, factor) in enumerate(zip(found, factors, strict=True), 1):
        step += (factor * (wide(t) - centre) - step) / k
    return centre + step


def _kept(kept: Bundle, slot: Slot, like: Tensor) -> Tensor:
    key = f"{slot.group}/{slot.name}"
    if slot.scalar:
        return torch.full_like(like, kept.scalars.get(key, 0.0))
    return kept.tensors[key].to(like) if key in kept.tensors else torch.zeros_like(like)


def _keep(kept: Bundle, centre: Mapping[Slot, Tensor]) -> Bundle:
    """Return the new centre; what this round did not hold stays as it is."""
    named = {f"{slot.group}/{slot.name}": (slot.scalar, t) for slot, t in centre.items()}
    new = {key: t for key, (scalar, t) in named.items() if not scalar}
    numbers = {key: float(t) for key, (scalar, t) in named.items() if scalar}
    return Bundle({**kept.tensors, **new}, {**kept.scalars, **numbers})
