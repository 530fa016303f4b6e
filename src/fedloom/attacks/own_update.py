"""Attacks on the attacker's own update, which need to know nothing of others.

    sign-flip:  u = -scale D_k                         D_k what the attacker trained
    gaussian:   u ~ N(0, std^2) in every coordinate
    scaling:    u = c D_k,  c = K / eta_s by default   (model replacement: Bagdasaryan et al., arXiv 1807.00459)

With equal weights, and honest clients that no longer move, c = K / eta_s makes the next global weights exactly those
that the attacker trained: w + eta_s / K (K / eta_s) D_k = w + D_k.

Differs from the paper in: c counts the K clients of the round, over whom the mean goes here, not all N.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import PositiveFloat

from fedloom.attacks.base import Attack, Scene, changed
from fedloom.types import ClientUpdate


class SignFlip(Attack, name="sign-flip"):
    """The trained change, turned round."""

    scale: PositiveFloat = 1.0
    """How many times its length."""

    def forged(self, own: ClientUpdate, honest: Sequence[ClientUpdate], scene: Scene) -> ClientUpdate:
        return changed(own, lambda name, t: -self.scale * t)


class Gaussian(Attack, name="gaussian"):
    """Noise in place of the trained change."""

    std: PositiveFloat = 1.0
    """Standard deviation of every coordinate."""

    def forged(self, own: ClientUpdate, honest: Sequence[ClientUpdate], scene: Scene) -> ClientUpdate:
        return changed(own, lambda name, t: self.std * torch.randn(t.shape, generator=scene.generator).to(t))


class Scaling(Attack, name="scaling"):
    """The trained change, enlarged until it replaces the global weights."""

    scale: PositiveFloat | None = None
    """How many times its length; null: the clients of the round over the server's learning rate."""

    def forged(self, own: ClientUpdate, honest: Sequence[ClientUpdate], scene: Scene) -> ClientUpdate:
        factor = len(scene.cohort) / scene.lr if self.scale is None else self.scale
        return changed(own, lambda name, t: factor * t)
