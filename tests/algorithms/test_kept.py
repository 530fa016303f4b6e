"""Mixtures and likenesses of kept adapters: the formulas, and where they are exact."""

from __future__ import annotations

import pytest
import torch
from tests.helpers import same
from torch import Tensor

from fedloom import tensors
from fedloom.algorithms import kept

SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 2, 2)}


def _adapters(n: int, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    stream = torch.Generator().manual_seed(3)
    return [{k: torch.randn(s, generator=stream, dtype=dtype) for k, s in SHAPES.items()} for _ in range(n)]


def _weights(n: int) -> Tensor:
    drawn = torch.rand(n, n, generator=torch.Generator().manual_seed(4), dtype=torch.float64) / n
    return (drawn + drawn.mT) / 2


def _by_hand(weights: Tensor, adapters: list[dict[str, Tensor]], k: int) -> dict[str, Tensor]:
    mixed = adapters[k]
    for j, other in enumerate(adapters):
        if j != k:
            mixed = tensors.add(mixed, tensors.sub(other, adapters[k]), alpha=float(weights[k, j]))
    return mixed


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_mixtures_are_the_formula(dtype: torch.dtype, atol: float) -> None:
    adapters, weights = _adapters(6, dtype), _weights(6)
    every = kept.mixtures(weights, adapters)
    for k in range(6):
        naive, one = _by_hand(weights, adapters, k), kept.mixture(weights[k].tolist(), adapters, k)
        for key in naive:
            for found in (every[k][key], one[key]):
                assert found.dtype == dtype
                torch.testing.assert_close(found, naive[key], rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_only_equal_adapters_weigh_on_stays_as_it_is(dtype: torch.dtype) -> None:
    adapters = _adapters(5, dtype)
    adapters[3] = tensors.clone(adapters[1])  # two that are equal, among others that are not
    weights = _weights(5)
    for one, other in ((1, 0), (1, 2), (1, 4), (3, 0), (3, 2), (3, 4)):
        weights[one, other] = 0
    every = kept.mixtures(weights, adapters)
    for k in (1, 3):
        assert same(every[k], dict(adapters[1]))
        assert same(dict(kept.mixture(weights[k].tolist(), adapters, k)), dict(adapters[1]))
    assert not same(every[0], dict(adapters[0]))
    for k, mixed in enumerate(kept.mixtures(torch.zeros(5, 5), adapters)):
        assert same(mixed, dict(adapters[k]))
    for mixed in kept.mixtures(_weights(4), [adapters[0]] + [tensors.clone(adapters[0]) for _ in range(3)]):
        assert same(mixed, dict(adapters[0]))


def test_mixtures_keep_the_sum_and_share_no_storage() -> None:
    adapters = _adapters(6)
    every = kept.mixtures(_weights(6), adapters)
    for key in SHAPES:
        before, after = (sum(one[key] for one in held) for held in (adapters, every))
        torch.testing.assert_close(after, before, rtol=0, atol=1e-14)
    places = [t.untyped_storage().data_ptr() for one in every for t in one.values()]
    assert len(set(places)) == len(places)


def test_likenesses() -> None:
    adapters, start = _adapters(5), {k: t / 3 for k, t in _adapters(1)[0].items()}
    adapters[4] = start
    flat = [torch.cat([t.flatten() for t in one.values()]) for one in adapters]
    begun = torch.cat([t.flatten() for t in start.values()])
    every = kept.cosines([tensors.sub(one, start) for one in adapters])
    city = kept.manhattan(adapters)
    for k in range(5):
        apart = kept.squared_distances(k, adapters)
        near = kept.cosines_with(k, adapters, start)
        for j in range(5):
            assert float(apart[j]) == pytest.approx(float((flat[k] - flat[j]).square().sum()), abs=1e-13)
            assert float(city[k, j]) == pytest.approx(float((flat[k] - flat[j]).abs().sum()), abs=1e-13)
            cosine = 0.0 if 4 in (j, k) else float(torch.cosine_similarity(flat[k] - begun, flat[j] - begun, 0))
            assert float(near[j]) == pytest.approx(cosine, abs=1e-13)
            assert float(every[k, j]) == pytest.approx(cosine, abs=1e-13)
