"""Attacks of clients that know the honest updates of a round, mean mu and standard deviation sigma in each coordinate.

A little is enough, ALIE (Baruch et al., arXiv 1902.06156): as far from the mean as still looks harmless,

    u = mu + z sigma,   z = Phi^-1((n - f - s) / (n - f)),   s = floor(n / 2) + 1 - f

of n clients f attack; s are the honest ones that a majority takes beside them.

Inner product manipulation, IPM (Xie et al., arXiv 1903.03936): against the honest mean, u = -epsilon mu.

Differ from the papers in: n, f, mu and sigma are those of the round's cohort; sigma divides by the number of honest
clients; s is at least 1; a single honest client has no sigma, so ALIE copies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import ClassVar

from pydantic import PositiveFloat
from torch import Tensor

from fedloom.attacks.base import Attack, Scene, changed, spread
from fedloom.types import ClientUpdate


class Alie(Attack, name="alie"):
    """A shift that hides within the spread of the honest updates."""

    omniscient: ClassVar[bool] = True

    z: float | None = None
    """Standard deviations from the mean; null: the formula."""

    def forged(self, own: ClientUpdate, honest: Sequence[ClientUpdate], scene: Scene) -> ClientUpdate:
        formula = furthest(len(scene.cohort), scene.f) if len(honest) > 1 else 0.0
        z = formula if self.z is None else self.z

        def shifted(name: str, t: Tensor) -> Tensor:
            mean, deviation = spread(honest, name)
            return mean + z * deviation

        return changed(own, shifted)


class Ipm(Attack, name="ipm"):
    """The honest mean, turned round."""

    omniscient: ClassVar[bool] = True

    epsilon: PositiveFloat = 0.5
    """How many times its length."""

    def forged(self, own: ClientUpdate, honest: Sequence[ClientUpdate], scene: Scene) -> ClientUpdate:
        return changed(own, lambda name, t: -self.epsilon * spread(honest, name)[0])


def furthest(n: int, f: int) -> float:
    """Return ALIE's z for n clients of which f attack and at least two do not."""
    supporters = max(1, n // 2 + 1 - f)
    return NormalDist().inv_cdf((n - f - supporters) / (n - f))
