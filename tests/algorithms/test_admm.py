"""Consensus ADMM: a naive second implementation, what z is, where it ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.algorithms.bowls import Bowl, Federation, near
from tests.algorithms.by_hand import drive

from fedloom.algorithms.admm import DUAL, OWN, Admm

BOWLS = {"a": Bowl(2.0, 1.0, rows=3), "b": Bowl(0.5, -4.0), "c": Bowl(1.0, 2.0)}
COHORTS: list[list[str]] = [["a", "b", "c"], ["a"], ["b", "c"], ["a", "c"]]


@pytest.mark.parametrize("over", ["all", "cohort"])
@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_a_naive_second_implementation(over: Any, weighting: Any) -> None:
    rho = 0.7
    them = Federation(Admm(rho=rho, over=over, weighting=weighting), BOWLS)
    p = {name: bowl.rows if weighting == "examples" else 1 for name, bowl in BOWLS.items()}
    z, w, u = 0.0, dict.fromkeys(BOWLS, 0.0), dict.fromkeys(BOWLS, 0.0)
    for cohort in COHORTS:
        change = 0.0
        for name in cohort:
            bowl, before = BOWLS[name], w[name] + u[name]
            for _ in range(bowl.steps):
                w[name] -= bowl.lr * (bowl.slope * (w[name] - bowl.target) + rho * (w[name] - z + u[name]))
            u[name] += w[name] - z
            change += p[name] * (w[name] + u[name] - before)
        z += change / sum(p[name] for name in (BOWLS if over == "all" else cohort))
        them.round(cohort)
        assert near(them.state.params, z, 1e-12)
        for name in cohort:
            assert near(them.memories[name][OWN].tensors, w[name], 1e-12)
            assert near(them.memories[name][DUAL].tensors, u[name], 1e-12)
        if over == "all":
            assert sum(p[n] * (w[n] + u[n]) for n in BOWLS) / sum(p.values()) == pytest.approx(z, abs=1e-12)


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_it_ends_in_the_optimum_of_the_sum(weighting: Any) -> None:
    """FedAvg would not: its clients' local steps differ in how far they go."""
    bowls = {name: Bowl(b.slope, b.target, steps=12, lr=0.3, rows=b.rows) for name, b in BOWLS.items()}
    them = Federation(Admm(rho=1.0, weighting=weighting), bowls)
    for _ in range(50):
        them.round()
    p = {name: b.rows if weighting == "examples" else 1 for name, b in bowls.items()}
    best = sum(p[n] * b.slope * b.target for n, b in bowls.items()) / sum(p[n] * b.slope for n, b in bowls.items())
    assert near(them.state.params, best, 1e-6)
    for name, bowl in bowls.items():
        assert near(them.own(name), best, 1e-6)
        # rho u = -grad f_k at the end
        assert near(them.memories[name][DUAL].tensors, -bowl.slope * (best - bowl.target), 1e-5)


def test_a_weak_pull_leaves_clients_at_their_own_optima() -> None:
    bowls = {name: Bowl(b.slope, b.target, steps=400) for name, b in BOWLS.items()}
    them = Federation(Admm(rho=1e-9), bowls)
    them.round()
    for name, bowl in bowls.items():
        assert near(them.own(name), bowl.target, 1e-6)


def test_where_it_is_adapted_it_is_drawn_as_in_training() -> None:
    rho = 0.7
    them = Federation(Admm(rho=rho), BOWLS)
    for _ in range(3):
        them.round(["a", "b"])
    z = float(them.state.params["w"][0])
    for name, bowl in BOWLS.items():
        memory = them.memories.get(name, {})
        w = float(memory[OWN].tensors["w"][0]) if memory else z
        u = float(memory[DUAL].tensors["w"][0]) if memory else 0.0
        message = them.algorithm.broadcast(them.server, them.state, name)
        adapted = drive(them.algorithm.adapt(them.client(name), message, 5), bowl.answer)
        for _ in range(5):
            w -= bowl.lr * (bowl.slope * (w - bowl.target) + rho * (w - z + u))
        assert near(adapted, w, 1e-12)


def test_what_travels_and_who_never_trained() -> None:
    them = Federation(Admm(), BOWLS)
    told = {name: float(them.algorithm.weight(b.rows)) for name, b in BOWLS.items()}
    assert them.state.slots["everyone"].scalars["weight"] == sum(told.values())
    them.round(["a", "b"])
    assert them.own("c") is them.state.params
    assert them.algorithm.export(them.state, {})["personal"] is them.state.params
    for update in them.updates:
        assert set(update.message.groups) == {"params"}
        sent, kept = update.message.groups["params"].tensors["w"], them.memories[update.client]
        assert not any(torch.equal(sent, kept[group].tensors["w"]) for group in (OWN, DUAL))
