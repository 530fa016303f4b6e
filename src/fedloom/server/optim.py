"""Server optimisers: how the combined change D of the clients is applied to the global weights w.

-D is a gradient to them (arXiv 2003.00295), and eta is `server.lr`, by default 1. That is plain averaging with sgd and
with neutral settings of fedavgm, nesterov and fedswa. The adaptive ones make steps of the order of eta whatever the
size of D: set `server.lr` to 1e-3 ... 1e-1 for them.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from fedloom import tensors
from fedloom.parts import Part
from fedloom.types import Bundle, Tensors

Decay = Annotated[float, Field(ge=0, lt=1)]


class ServerOptimizer(Part, family=True):
    """Maps (weights, combined change, kept state) to (new weights, new state)."""

    def step(self, params: Tensors, delta: Tensors, kept: Bundle, lr: float) -> tuple[Tensors, Bundle]:
        """Return the new weights and what the optimiser keeps until the next round (an empty Bundle: nothing).

        Args:
            params: the global weights.  delta: the combined change, same names.
            kept: what the last step returned; empty before the first.  lr: the server's learning rate.
        """
        raise NotImplementedError


class ServerSgd(ServerOptimizer, name="sgd"):
    """w <- w + lr * delta; lr = 1 is plain averaging (arXiv 2003.00295 names the family)."""

    def step(self, params: Tensors, delta: Tensors, kept: Bundle, lr: float) -> tuple[Tensors, Bundle]:
        return tensors.add(params, delta, alpha=lr), kept


class FedAvgM(ServerOptimizer, name="fedavgm"):
    """Heavy ball (arXiv 1909.06335): v <- beta v + D, w <- w + eta v.

    A constant D comes to move the weights by eta D / (1 - beta) a round; eta = 1 - beta keeps the pace of averaging.
    """

    momentum: Decay = 0.9
    """beta; 0 is plain averaging."""

    def step(self, params: Tensors, delta: Tensors, kept: Bundle, lr: float) -> tuple[Tensors, Bundle]:
        velocity = tensors.add(delta, kept.tensors, alpha=self.momentum) if kept.tensors else delta
        return tensors.add(params, velocity, alpha=lr), Bundle(velocity)


class FedAvgMEma(ServerOptimizer, name="fedavgm-ema"):
    """The moving average of the changes: v <- beta v + (1 - beta) D, v = D in the first round; w <- w + eta v."""

    momentum: Decay = 0.9
    """beta; 0 is plain averaging."""

    def step(self, params: Tensors, delta: Tensors, kept: Bundle, lr: float) -> tuple[Tensors, Bundle]:
        velocity: Tensors = delta
        if kept.tensors:
            velocity = tensors.add(tensors.scale(delta, 1 - self.momentum), kept.tensors, alpha=self.momentum)
        return tensors.add(params, velocity, alpha=lr), Bundle(velocity)


class Nesterov(ServerOptimizer, name="nesterov"):
    """Nesterov's momentum, the outer optimiser of DiLoCo (arXiv 2311.08105): v <- mu v + D, w <- w + eta (D + mu v).

    The same as torch.optim.SGD(nesterov=True) on the gradient -D. DiLoCo takes eta = 0.7 and mu = 0.9: the first step
    is then 1.33 D already.
    """

    momentum: Decay = 0.9
    """mu; 0 is plain averaging."""

    def step(self, params: Tensors, delta: Tensors, kept: Bundle, lr: float) -> tuple[Tensors, Bundle]:
        velocity = tensors.add(delta, kept.tensors, alpha=self.momentum) if kept.tensors else delta
        ahead = tensors.add(delta, velocity, alpha=self.momentum)
        return tensors.add(params, ahead, alpha=lr), Bundle(velocity)


class FedSwa(ServerOptimizer, name="fedswa"):
    """The server's half of FedSWA (arXiv 2507.20016): w <- w + eta alpha D, beyond the mean of the clients.

    The clients' half is a learning rate that falls to rho times itself within each round: `trainer.decay`, 0.1 in the
    paper, with plain SGD and a uniform mean (`algorithm.weighting=uniform`). alpha = 1 and rho = 1 is plain averaging.
    """

    alpha: PositiveFloat = 1.5
    """How far to go along the mean change; 1 ends at the clients' mean."""

    def step(self, params: Tensors, delta: Tensors, kept: Bundle, lr: float) -> tuple[Tensors, Bundle]:
        return tensors.add(params, delta, alpha=lr * self.alpha), kept


class Adaptive(ServerOptimizer):
    """FedOpt (arXiv 2003.00295): m <- beta1 m + (1 - beta1) D, a second moment v, w <- w + eta m / (sqrt v + tau).

    m starts at 0 and v at tau^2, without bias correction, as in the paper. In the first round a change far below tau is
    scaled by eta (1 - beta1) / (2 tau), and one far above it makes a step of the order of eta.
    """

    beta1: Decay = 0.9
    """Momentum of the step."""
    tau: PositiveFloat = 1e-3
    """The smaller, the more alike are the steps of all weights."""

    def second(self, old: Tensor, squared: Tensor) -> Tensor:
        """Return the new v of the old one and D^2."""
        raise NotImplementedError

    def step(self, params: Tensors, delta: Tensors, kept: Bundle, lr: float) -> tuple[Tensors, Bundle]:
        after, state = {}, {}
        for name, change in delta.items():
            first = kept.tensors.get(f"first.{name}", torch.zeros_like(change))
            second = kept.tensors.get(f"second.{name}", torch.full_like(change, self.tau**2))
            first, second = self.beta1 * first + (1 - self.beta1) * change, self.second(second, change.square())
            state[f"first.{name}"], state[f"second.{name}"] = first, second
            after[name] = params[name] + lr * first / (second.sqrt() + self.tau)
        return after, Bundle(state)


class FedAdagrad(Adaptive, name="fedadagrad"):
    """FedAdagrad (arXiv 2003.00295): v <- v + D^2, so the steps shrink from round to round."""

    beta1: Decay = 0.0
    """Momentum of the step."""

    def second(self, old: Tensor, squared: Tensor) -> Tensor:
        return old + squared


class FedYogi(Adaptive, name="fedyogi"):
    """FedYogi (arXiv 2003.00295): v <- v - (1 - beta2) D^2 sign(v - D^2), so v moves as slowly down as up."""

    beta2: Decay = 0.99
    """Memory of the second moment."""

    def second(self, old: Tensor, squared: Tensor) -> Tensor:
        return old - (1 - self.beta2) * squared * torch.sign(old - squared)


class FedAdam(Adaptive, name="fedadam"):
    """FedAdam (arXiv 2003.00295): v <- beta2 v + (1 - beta2) D^2."""

    beta2: Decay = 0.99
    """Memory of the second moment."""

    def second(self, old: Tensor, squared: Tensor) -> Tensor:
        return self.beta2 * old + (1 - self.beta2) * squared
