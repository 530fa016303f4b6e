"""Clients whose losses are a/2 ||w - c||^2, trained by gradient descent as `Fit` says, under any algorithm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tests.algorithms.by_hand import drive
from tests.bare import bare_server
from torch import Tensor

from fedloom import tensors
from fedloom.algorithms import Algorithm, Client, Server
from fedloom.types import Bundle, ClientUpdate, Effect, Fit, Fitted, Memory, Message, ServerState, Tensors


@dataclass(frozen=True)
class Bowl:
    """One client: its loss (of the sum over all tensors), and how it trains on it."""

    slope: float
    target: float
    steps: int = 3
    lr: float = 0.1
    rows: int = 1

    def loss(self, w: Tensors) -> Tensor:
        """Return a/2 ||w - c||^2."""
        return torch.stack([0.5 * self.slope * (t - self.target).square().sum() for t in w.values()]).sum()

    def answer(self, effect: Effect) -> Any:
        """Train, or tell losses as if there were one row."""
        if isinstance(effect, Fit):
            return self._fit(effect)
        nll = self.loss(effect.params)  # type: ignore[union-attr,arg-type]
        return Bundle(scalars={"nll": float(nll), "tokens": 1.0, "bytes": 1.0, "examples": 1.0})

    def _fit(self, effect: Fit) -> Fitted:
        w = {name: t.clone() for name, t in effect.start.items()}
        moving = [name for name in w if effect.trainable is None or effect.trainable(name)]
        lr, steps = self.lr if effect.lr is None else effect.lr, effect.steps
        taken = range(self.steps) if steps is None else steps
        losses = []
        for _ in taken:
            live = {name: t.requires_grad_(name in moving) for name, t in w.items()}
            loss = self.loss(live)
            total = loss + effect.penalty(live) if effect.penalty is not None else loss
            gradients = torch.autograd.grad(total, [live[name] for name in moving])
            w = {name: t.detach() for name, t in live.items()}
            w.update({name: w[name] - lr * g for name, g in zip(moving, gradients, strict=True)})
            losses.append(float(loss.detach()))
        return Fitted(w, len(losses), lr, len(losses), len(losses), tuple(losses))


@dataclass
class Federation:
    """A server, clients in bowls, and all that was sent in the last round."""

    algorithm: Algorithm
    bowls: Mapping[str, Bowl]
    initial: Tensors = field(default_factory=lambda: {"w": torch.zeros(2, dtype=torch.float64)})
    memories: dict[str, Memory] = field(default_factory=dict)
    down: dict[str, Message] = field(default_factory=dict)
    updates: list[ClientUpdate] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.server: Server = bare_server(tuple(self.bowls))
        self.state: ServerState = self.algorithm.init(self.initial)
        if self.algorithm.enrols:
            told = {name: drive(self.algorithm.enrol(self.client(name))) for name in self.bowls}
            self.state = drive(self.algorithm.admit(self.server, self.state, told))

    def client(self, name: str) -> Client:
        """Return what a client sees."""
        bowl, memory = self.bowls[name], self.memories.get(name, {})
        weight = self.algorithm.weight(bowl.rows)
        return Client(name, self.state.round, memory, bowl.rows, weight, self.initial, lambda _: {}, None, bowl.steps)

    def round(self, cohort: Sequence[str] = ()) -> ServerState:
        """Run one round of a cohort (empty: of all)."""
        self.down, self.updates = {}, []
        self.state = drive(self.algorithm.prepare(self.server, self.state))
        for name in cohort or self.bowls:
            self.down[name] = self.algorithm.broadcast(self.server, self.state, name)
            steps = self.algorithm.train(self.client(name), self.down[name])
            update, self.memories[name] = drive(steps, self.bowls[name].answer)
            self.updates.append(update)
        combined = drive(self.algorithm.combine(self.server, self.state, self.updates))
        self.state = drive(self.algorithm.step(self.server, self.state, combined))
        return self.state

    def own(self, name: str) -> Tensors:
        """Return what a client would use now."""
        message = self.algorithm.broadcast(self.server, self.state, name)
        found: Tensors = drive(self.algorithm.own(self.client(name), message), self.bowls[name].answer)
        return found


def near(a: Tensors, value: float, atol: float = 1e-9) -> bool:
    """Return whether every number of an adapter is `value`."""
    return all(bool((t - value).abs().max() <= atol) for t in a.values())


def apart(a: Tensors, b: Tensors) -> float:
    """Return the Euclidean distance of two adapters."""
    return tensors.norm(tensors.sub(a, b))
