"""Clients whose losses are 1/2 a (w - c)^2, trained by SGD in plain numbers, under any algorithm and server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedloom.algorithms import Algorithm, Client, Server
from fedloom.types import Bundle, ClientUpdate, Effect, Fit, Fitted, Memory, ServerState


@dataclass(frozen=True)
class Curve:
    """One client: its loss, and how it trains on it."""

    slope: float
    target: float
    steps: int = 1
    lr: float = 0.1
    momentum: float = 0.0
    rows: int = 1

    def loss(self, w: float) -> float:
        """Return 1/2 a (w - c)^2."""
        return 0.5 * self.slope * (w - self.target) ** 2

    def answer(self, effect: Effect) -> Any:
        """Train, or tell the loss sums of 4 tokens."""
        if not isinstance(effect, Fit):
            return Bundle(scalars={"nll": 4 * self.loss(float(effect.params["w"])), "tokens": 4.0})
        w, kept = effect.start["w"].clone(), effect.optimizer_state
        v = kept.tensors.get("v", torch.zeros_like(w)) if kept is not None else torch.zeros_like(w)
        for _ in range(self.steps):
            v = self.momentum * v + self.slope * (w - self.target)
            w = w - self.lr * v
        state = Bundle({"v": v}) if kept is not None else Bundle()
        return Fitted({"w": w}, self.steps, self.lr, 1, 1, (0.0,) * self.steps, (), state)


def one_round(
    algorithm: Algorithm,
    server: Server,
    state: ServerState,
    curves: Mapping[str, Curve],
    memories: dict[str, Memory],
) -> tuple[ServerState, list[ClientUpdate]]:
    """Run one round of some clients, and return its updates as well."""
    updates = []
    for name, curve in curves.items():
        weight = algorithm.weight(curve.rows)
        client = Client(name, state.round, memories.get(name, {}), curve.rows, weight, state.params, lambda _: {})
        steps = algorithm.train(client, algorithm.broadcast(server, state, name))
        update, memories[name] = drive(steps, curve.answer)
        updates.append(update)
    combined = drive(algorithm.combine(server, state, updates))
    return drive(algorithm.step(server, state, combined)), updates


def federate(
    algorithm: Algorithm, server: Server, curves: Mapping[str, Curve], rounds: int, start: float = 0.0
) -> ServerState:
    """Run rounds with full participation."""
    state = algorithm.init({"w": torch.full((1,), start, dtype=torch.float64)})
    memories: dict[str, Memory] = {}
    for _ in range(rounds):
        state, _ = one_round(algorithm, server, state, curves, memories)
    return state


def drive(steps: Any, answer: Any = None) -> Any:
    """Run a coroutine to its end."""
    sent = None
    try:
        while True:
            sent = answer(steps.send(sent))
    except StopIteration as stop:
        return stop.value
