"""Combining, stepping and sampling."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.bare import bare_around

from fedloom.server.aggregate import Mean
from fedloom.server.optim import ServerSgd
from fedloom.server.sampling import Uniform
from fedloom.types import Bundle, ClientUpdate, Message, RecipeError


def _update(name: str, value: torch.Tensor, weight: float = 1.0) -> ClientUpdate:
    return ClientUpdate(name, weight, Message({"params": Bundle({"w": value})}))


def test_mean_of_equal_updates_is_exactly_that_update() -> None:
    value = torch.randn(100, generator=torch.Generator().manual_seed(0))
    combined = Mean().combine(
        (_update(str(i), value, weight) for i, weight in enumerate((3.0, 7.0, 11.0))), bare_around()
    )
    assert torch.equal(combined.groups["params"].tensors["w"], value)
    assert combined.groups["cohort"].scalars == {"clients": 3.0, "weight": 21.0}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 50)), min_size=1, max_size=8))
def test_mean_is_the_weighted_mean_and_rises_to_float32(items: list[tuple[float, int]]) -> None:
    updates = [_update(str(i), torch.tensor([v], dtype=torch.bfloat16), w) for i, (v, w) in enumerate(items)]
    mean = Mean().combine(updates, bare_around()).groups["params"].tensors["w"]
    values = [float(u.message.groups["params"].tensors["w"]) for u in updates]
    expected = sum(v * w for v, (_, w) in zip(values, items, strict=True)) / sum(w for _, w in items)
    assert mean.dtype == torch.float32
    assert float(mean) == pytest.approx(expected, abs=1e-5)


def test_mean_leaves_the_updates_alone_and_refuses_odd_ones() -> None:
    first = torch.ones(2)
    Mean().combine([_update("a", first), _update("b", torch.zeros(2))], bare_around())
    assert torch.equal(first, torch.ones(2))
    other = ClientUpdate("b", 1.0, Message({"params": Bundle({"v": first})}))
    with pytest.raises(ValueError, match="update of b"):
        Mean().combine([_update("a", first), other], bare_around())
    with pytest.raises(ValueError, match="no update"):
        Mean().combine([], bare_around())


def test_server_learning_rate() -> None:
    params, _ = ServerSgd().step({"w": torch.zeros(1)}, {"w": torch.ones(1)}, Bundle(), 0.5)
    assert float(params["w"]) == 0.5


def test_cohorts_are_a_function_of_seed_and_round() -> None:
    clients = [f"c{i}" for i in range(50)]
    sampler = Uniform(count=10)
    cohort = sampler.cohort(3, clients, seed=1)
    assert cohort == sampler.cohort(3, clients, seed=1) == sorted(cohort, key=clients.index)
    assert len(set(cohort)) == 10
    assert cohort != sampler.cohort(4, clients, seed=1)
    assert cohort != sampler.cohort(3, clients, seed=2)
    assert Uniform().cohort(0, clients, 0) == clients
    assert len(Uniform(fraction=0.05).cohort(0, clients, 0)) == 3
    seen = {name for r in range(60) for name in sampler.cohort(r, clients, 0)}
    assert seen == set(clients)
    with pytest.raises(RecipeError, match=r"sampler.count is 10 but there are 3 clients"):
        sampler.cohort(0, clients[:3], 0)
