"""Algorithms driven by hand on problems whose answers are known in closed form (no model at all)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from tests.algorithms.quadratics import drive
from tests.bare import bare_around, bare_server
from torch import Tensor

from fedloom.algorithms import Algorithm, Client
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedprox import FedProx
from fedloom.algorithms.scaffold import Scaffold
from fedloom.server.aggregate import Mean
from fedloom.types import Bundle, ClientUpdate, Fit, Fitted, Memory, Message, ServerState

Solve = Callable[[str, Fit], Fitted]


def federate(algorithm: Algorithm, start: Tensor, clients: Mapping[str, int], solve: Solve, rounds: int) -> ServerState:
    """Run rounds with full participation, answering every Fit by `solve`."""
    server = bare_server(tuple(clients))
    state = algorithm.init({"w": start})
    memories: dict[str, Memory] = {name: {} for name in clients}
    for _ in range(rounds):
        updates = []
        for name, examples in clients.items():
            weight = algorithm.weight(examples)
            client = Client(
                name, state.round, memories[name], examples, weight, {"w": start}, lambda round_: {"w": start}
            )
            steps = algorithm.train(client, algorithm.broadcast(server, state, name))
            update, memories[name] = drive(steps, lambda effect, name=name: solve(name, effect))
            updates.append(update)
        combined = drive(algorithm.combine(server, state, updates), None)
        state = drive(algorithm.step(server, state, combined), None)
    return state


def sgd(slope: float, target: float, steps: int, lr: float) -> Callable[[Fit], Fitted]:
    """Plain SGD on 1/2 a (w - c)^2 with the effect's correction and penalty."""

    def solve(effect: Fit) -> Fitted:
        w = effect.start["w"].clone()
        for _ in range(steps):
            gradient = slope * (w - target)
            if effect.correct is not None:
                gradient = gradient + effect.correct.tensors["w"]
            w = w - lr * gradient
        return Fitted({"w": w}, steps, lr, 1, 1, (0.0,) * steps)

    return solve


CURVES = {"a": (1.0, 0.0), "b": (3.0, 2.0)}  # client -> (curvature, minimum)
OPTIMUM = (1.0 * 0.0 + 3.0 * 2.0) / (1.0 + 3.0)


def _solve(name: str, effect: Fit) -> Fitted:
    slope, target = CURVES[name]
    return sgd(slope, target, steps=10, lr=0.1)(effect)


def test_fedavg_stops_beside_the_optimum_where_the_formula_says() -> None:
    start = torch.zeros(1, dtype=torch.float64)
    state = federate(FedAvg(weighting="uniform"), start, {"a": 1, "b": 1}, _solve, 200)
    pull = {name: 1 - (1 - 0.1 * slope) ** 10 for name, (slope, _) in CURVES.items()}
    fixed = sum(pull[n] * CURVES[n][1] for n in CURVES) / sum(pull.values())
    assert float(state.params["w"]) == pytest.approx(fixed, abs=1e-12)
    assert abs(fixed - OPTIMUM) > 0.1


def test_scaffold_reaches_the_optimum() -> None:
    start = torch.zeros(1, dtype=torch.float64)
    state = federate(Scaffold(), start, {"a": 1, "b": 1}, _solve, 200)
    assert float(state.params["w"]) == pytest.approx(OPTIMUM, abs=1e-9)


def test_scaffold_on_identical_clients_is_fedavg() -> None:
    same = lambda name, effect: sgd(2.0, 1.0, steps=3, lr=0.1)(effect)
    start, clients = torch.full((1,), 5.0, dtype=torch.float64), {"a": 1, "b": 1, "c": 1}
    for rounds in (1, 2, 5):
        plain = federate(FedAvg(weighting="uniform"), start, clients, same, rounds)
        scaffold = federate(Scaffold(), start, clients, same, rounds)
        torch.testing.assert_close(scaffold.params["w"], plain.params["w"], rtol=0, atol=1e-15)
        assert float(scaffold.slots["control"].tensors["w"].abs()) > 0


@pytest.mark.parametrize("mu", [0.5, 2.0, 1e9])
def test_fedprox_exact_minimiser(mu: float) -> None:
    start, slope, target = torch.tensor([5.0], dtype=torch.float64), 2.0, 1.0

    def solve(name: str, effect: Fit) -> Fitted:
        # Newton's step on the quadratic and its penalty is exact
        w = effect.start["w"].clone().requires_grad_()
        gradient = torch.autograd.grad(effect.penalty({"w": w}), w, create_graph=True)[0]
        (curvature,) = torch.autograd.grad(gradient.sum(), w)
        total = slope * (w - target) + gradient
        return Fitted({"w": (w - total / (slope + curvature)).detach()}, 1, 1.0, 1, 1, (0.0,))

    state = federate(FedProx(mu=mu), start, {"a": 1}, solve, 1)
    assert float(state.params["w"]) == pytest.approx((slope * target + mu * 5.0) / (slope + mu), rel=1e-9)


def test_averaging_factors_is_not_averaging_products() -> None:
    def update(name: str, a: list[float], weight: float) -> ClientUpdate:
        row = torch.tensor([a], dtype=torch.float64)
        return ClientUpdate(name, weight, Message({"params": Bundle({"A": row, "B": row.T})}))

    mean = (
        Mean()
        .combine([update("a", [1.0, 0.0], 2.0), update("b", [0.0, 1.0], 1.0)], bare_around())
        .groups["params"]
        .tensors
    )
    product = mean["B"] @ mean["A"]
    expected = torch.tensor([[4.0, 2.0], [2.0, 1.0]], dtype=torch.float64) / 9
    torch.testing.assert_close(product, expected, rtol=0, atol=1e-15)
    assert not torch.allclose(product, torch.diag(torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)))


def test_weights_are_example_counts_or_one() -> None:
    assert FedAvg().weight(7) == 7.0
    assert FedAvg(weighting="uniform").weight(7) == 1.0
    assert Scaffold().weight(7) == 1.0


def test_scaffold_variants_say_where_the_correction_enters() -> None:
    client = Client("a", 0, {}, 3, 1.0, {}, lambda round_: {})
    message = Message({"params": Bundle({"w": torch.zeros(2)}), "control": Bundle({"w": torch.ones(2)})})
    for variant, where in (("sgd_exact", "gradient"), ("grad_side", "gradient"), ("post_step_adamw", "weights")):
        effect = next(Scaffold(variant=variant).train(client, message))
        assert effect.correct.where == where
        assert torch.equal(effect.correct.tensors["w"], torch.ones(2))
