"""Robust rules: known answers, second implementations from the equations, and what no rule may do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from tests.bare import bare_around
from torch import Tensor

from fedloom.factors import Factors, pairs
from fedloom.server.aggregate import Aggregator, Mean
from fedloom.server.robust import distances, dnc
from fedloom.server.robust.base import Robust
from fedloom.server.robust.bulyan import Bulyan
from fedloom.server.robust.clipping import CenteredClipping, NormBound
from fedloom.server.robust.coordinates import Median, TrimmedMean
from fedloom.server.robust.dnc import DnC
from fedloom.server.robust.foolsgold import FoolsGold
from fedloom.server.robust.geometric_median import GeometricMedian
from fedloom.server.robust.krum import Krum, MultiKrum
from fedloom.types import Bundle, ClientUpdate, Message

RULES: list[Robust] = [
    Krum(),
    MultiKrum(),
    Median(),
    TrimmedMean(),
    Bulyan(),
    GeometricMedian(),
    CenteredClipping(tau=1e3),
    NormBound(),
    FoolsGold(),
    DnC(),
]
POINTS = [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1), (0.1, 0.1), (10.0, 10.0)]
NAMES = [rule.part_name for rule in RULES]


def updates(rows: Any, weight: float = 1.0) -> list[ClientUpdate]:
    """Return one update a row, cut into two tensors."""
    table = torch.as_tensor(np.asarray(rows), dtype=torch.float64)
    return [
        ClientUpdate(f"c{k}", weight, Message({"params": Bundle({"b": row[:1].clone(), "a": row[1:].clone()})}))
        for k, row in enumerate(table)
    ]


def combined(rule: Aggregator, held: list[ClientUpdate], **around: Any) -> Tensor:
    found = rule.combine(held, bare_around(**around)).groups["params"].tensors
    return torch.cat([found["b"], found["a"]])


def drawn(n: int, p: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, p))


def close(found: Tensor, expected: Any, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, torch.as_tensor(np.asarray(expected)), rtol=0, atol=atol)


def test_every_rule_is_under_test() -> None:
    assert set(NAMES) == {name for name, part in Aggregator.known.items() if issubclass(part, Robust)}


def test_krums_five_points() -> None:
    apart = Krum().distances(updates(POINTS), bare_around())
    close(distances.scores(apart, 1), [0.02, 0.02, 0.02, 0.02, 394.03])
    assert distances.ranking(apart, 1)[-1] == 4
    assert combined(Krum(), updates(POINTS)).tolist() in [list(p) for p in POINTS[:4]]
    close(combined(MultiKrum(), updates(POINTS)), [0.05, 0.05])


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_equal_updates_give_exactly_that_update(rule: Robust) -> None:
    row = torch.randn(7, generator=torch.Generator().manual_seed(0)).tolist()
    assert combined(rule, updates([row] * 7)).tolist() == torch.tensor(row, dtype=torch.float64).tolist()


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
@pytest.mark.parametrize("n", [7, 8])
def test_the_order_of_clients_does_not_matter(rule: Robust, n: int) -> None:
    held = updates(drawn(n, 6))
    turned = [held[k] for k in np.random.default_rng(1).permutation(n)]
    close(combined(rule, turned), combined(rule, held), 1e-14)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_the_number_of_rows_plays_no_part(rule: Robust) -> None:
    rows = drawn(7, 6)
    heavy = [ClientUpdate(u.client, 3.0 + k, u.message) for k, u in enumerate(updates(rows))]
    found = rule.combine(heavy, bare_around())
    assert found.groups["cohort"].scalars == {"clients": 7.0, "weight": sum(3.0 + k for k in range(7))}
    close(combined(rule, heavy), combined(rule, updates(rows)), 0)


@pytest.mark.parametrize("rule", [r for r in RULES if not isinstance(r, FoolsGold)], ids=lambda r: r.part_name)
def test_one_far_client_moves_the_result_but_little(rule: Robust) -> None:
    rule = CenteredClipping(tau=3.0) if isinstance(rule, CenteredClipping) else rule
    rows = drawn(9, 20)
    rows[3] = 1e6
    benign = np.delete(rows, 3, 0)
    found = combined(rule, updates(rows)).numpy()
    assert np.linalg.norm(found - benign.mean(0)) < 2 * np.linalg.norm(benign, axis=1).max()
    assert np.linalg.norm(combined(Mean(), updates(rows)).numpy()) > 1e5


@pytest.mark.parametrize("rule", [Median(), TrimmedMean(f=3), Krum(f=3), MultiKrum(f=3)], ids=lambda r: r.part_name)
@pytest.mark.parametrize("far", [1e6, -1e6, 3e38])
def test_f_outliers_leave_the_result_in_the_hull_of_the_others(rule: Robust, far: float) -> None:
    rows = drawn(9, 20)
    rows[[0, 4, 8]] = far
    benign = np.delete(rows, [0, 4, 8], 0)
    found = combined(rule, updates(rows)).numpy()
    assert (benign.min(0) <= found).all()
    assert (found <= benign.max(0)).all()


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_median_of_an_even_number_is_the_mean_of_the_middle_two(n: int) -> None:
    rows = drawn(n, 6)
    close(combined(Median(), updates(rows)), np.median(rows, axis=0))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3), st.integers(0, 4), st.integers(0, 99))
def test_trimmed_mean_against_numpy(f: int, more: int, seed: int) -> None:
    rows = drawn(2 * f + 1 + more, 6, seed)
    expected = np.sort(rows, 0)[f : len(rows) - f].mean(0)
    close(combined(TrimmedMean(f=f), updates(rows)), expected)
    if f == 0:
        close(combined(TrimmedMean(f=0), updates(rows)), combined(Mean(), updates(rows)))


def naive_krum(rows: np.ndarray, f: int) -> list[float]:
    n, found = len(rows), []
    for k in range(n):
        squares = sorted(sum((rows[k] - rows[j]) ** 2) for j in range(n) if j != k)
        found.append(sum(squares[: max(1, n - f - 2)]))
    return found


@pytest.mark.parametrize(("n", "f"), [(5, 1), (9, 3), (8, 0)])
def test_krum_against_the_equations(n: int, f: int) -> None:
    rows = drawn(n, 6, n)
    score = naive_krum(rows, f)
    close(distances.scores(Krum().distances(updates(rows), bare_around()), f), score)
    close(combined(Krum(f=f), updates(rows)), rows[int(np.argmin(score))])
    best = np.argsort(score)
    close(combined(MultiKrum(f=f), updates(rows)), rows[best[: n - f]].mean(0))
    close(combined(MultiKrum(f=f, m=2), updates(rows)), rows[best[:2]].mean(0))


@pytest.mark.parametrize(("n", "f"), [(7, 1), (11, 2), (12, 2), (4, 0)])
def test_bulyan_against_the_equations(n: int, f: int) -> None:
    rows = drawn(n, 6, n)
    left, chosen = list(range(n)), []
    while len(chosen) < n - 2 * f:
        score = np.array(naive_krum(rows[left], f)) if len(left) > 1 else np.zeros(1)
        ties = np.flatnonzero(np.isclose(score, score.min(), rtol=1e-12, atol=0))
        total = [sum(((rows[left[i]] - rows[j]) ** 2).sum() for j in left) for i in ties]
        chosen.append(left.pop(int(ties[int(np.argmin(total))])))
    expected = []
    for column in rows[chosen].T:
        near = sorted(column, key=lambda x: abs(x - np.median(column)))[: n - 4 * f]
        expected.append(np.mean(near))
    close(combined(Bulyan(f=f), updates(rows)), expected)


def test_geometric_median_minimises_the_summed_distance() -> None:
    rows = drawn(9, 4)
    rows[0] = 1e6
    total = lambda v: np.linalg.norm(rows - v, axis=1).sum()
    best = minimize(total, np.median(rows, 0), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    close(combined(GeometricMedian(iterations=200), updates(rows)), best.x, 1e-4)
    at = np.median(rows, 0)
    for _ in range(2):
        beta = 1 / np.maximum(1e-6, np.linalg.norm(rows - at, axis=1))
        at = (beta[:, None] * rows).sum(0) / beta.sum()
    close(combined(GeometricMedian(iterations=2), updates(rows)), at, 1e-9)


def test_centred_clipping_against_the_equations_and_over_rounds() -> None:
    rule, v, kept = CenteredClipping(tau=0.7, iterations=2), np.zeros(5), Bundle()
    for seed in range(3):
        rows = drawn(4, 5, seed)
        for _ in range(2):
            steps = [(u - v) * min(1, 0.7 / np.linalg.norm(u - v)) for u in rows]
            v = v + np.mean(steps, 0)
        found = rule.combine(updates(rows), bare_around(kept=kept))
        kept = found.groups["aggregator"]
        close(torch.cat([found.groups["params"].tensors[n] for n in ("b", "a")]), v)
    close(combined(CenteredClipping(tau=1e9), updates(rows)), rows.mean(0))


def test_what_a_round_does_not_hold_keeps_its_centre() -> None:
    rule = CenteredClipping()
    first = rule.combine([ClientUpdate("c", 1.0, Message({"params": Bundle({"x": torch.ones(1)})}))], bare_around())
    kept = first.groups["aggregator"]
    held = [ClientUpdate("c", 1.0, Message({"params": Bundle({"y": torch.ones(1)}), "n": Bundle(scalars={"z": 0.5})}))]
    after = rule.combine(held, bare_around(kept=kept)).groups["aggregator"]
    assert torch.equal(after.tensors["params/x"], kept.tensors["params/x"])
    assert after.scalars == {"n/z": 0.5}


def test_norm_bound() -> None:
    rows = drawn(5, 6)
    lengths = np.linalg.norm(rows, axis=1)
    for rule, most in ((NormBound(norm=1.5), 1.5), (NormBound(), np.median(lengths)), (NormBound(norm=1e9), 1e9)):
        close(combined(rule, updates(rows)), (rows * np.minimum(1, most / lengths)[:, None]).mean(0))
    noisy = combined(NormBound(norm=1e9, noise=0.1), updates(drawn(5, 4000)))
    apart = noisy - combined(NormBound(norm=1e9), updates(drawn(5, 4000)))
    assert float(apart.std()) == pytest.approx(0.1, rel=0.1)
    assert torch.equal(noisy, combined(NormBound(norm=1e9, noise=0.1), updates(drawn(5, 4000))))


def naive_foolsgold(histories: np.ndarray) -> np.ndarray:
    n = len(histories)
    unit = histories / np.linalg.norm(histories, axis=1, keepdims=True)
    cs = unit @ unit.T - np.eye(n)
    v = cs.max(1)
    for i in range(n):
        for j in range(n):
            if i != j and v[i] < v[j]:
                cs[i, j] *= v[i] / v[j]
    alpha = np.clip(1 - cs.max(1), 0, 1)
    alpha = alpha / alpha.max()
    alpha[alpha == 1] = 0.99
    with np.errstate(divide="ignore"):
        return np.clip(np.log(alpha / (1 - alpha)) + 0.5, 0, 1)


def test_foolsgold_against_the_equations_and_over_rounds() -> None:
    rule, kept, total = FoolsGold(), Bundle(), np.zeros((6, 8))
    shared = np.random.default_rng(5).normal(size=8)
    for seed in range(3):
        rows = drawn(6, 8, seed) + 1.0
        rows[:3] = shared + 0.01 * drawn(3, 8, seed + 9)
        total += rows
        found = rule.combine(updates(rows), bare_around(kept=kept))
        kept = found.groups["aggregator"]
        alpha = naive_foolsgold(total)
        close(torch.cat([found.groups["params"].tensors[n] for n in ("b", "a")]), alpha @ rows / alpha.sum(), 1e-9)
        assert alpha[:3].max() < 0.05 < alpha[3:].max()
    absent = rule.combine(updates(drawn(2, 8)), bare_around(kept=kept)).groups["aggregator"].tensors
    assert torch.equal(absent["c5/a"], kept.tensors["c5/a"])
    assert not torch.equal(absent["c0/a"], kept.tensors["c0/a"])


def test_dnc_against_the_equations() -> None:
    rows = drawn(9, 40) + 20.0  # what all have in common is no reason to drop anybody
    rows[[2, 5]] -= 3.0
    rule = DnC(f=2, iterations=3, coordinates=12)
    # names in order: a before b
    flat, stream = np.concatenate([rows[:, 1:], rows[:, :1]], 1), bare_around().stream
    good = set(range(9))
    for _ in range(3):
        where = torch.randperm(40, generator=stream)[:12].numpy()
        part = flat[:, where] - flat[:, where].mean(0)
        top = np.linalg.svd(part)[2][0]
        good &= set(np.argsort((part @ top) ** 2)[:7].tolist())
    assert not good & {2, 5}
    close(combined(rule, updates(rows)), rows[sorted(good)].mean(0))
    assert float(dnc.outliers(torch.zeros(3, 4, dtype=torch.float64)).sum()) == 0.0


def lora(g: Tensor | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Return the factors of two modules, in another basis if there is one."""
    stream = torch.Generator().manual_seed(seed)
    found = {}
    for module in ("m0", "m1"):
        a, b = (torch.randn(*shape, generator=stream, dtype=torch.float64) for shape in ((2, 5), (4, 2)))
        found[f"{module}.lora_A"] = a if g is None else g @ a
        found[f"{module}.lora_B"] = b if g is None else b @ torch.linalg.inv(g)
    return found


def around_lora() -> Any:
    start = {name: torch.zeros_like(t) for name, t in lora().items()}
    return bare_around(start, lambda rank: 4 / rank)


def test_distance_of_products_does_not_depend_on_the_basis() -> None:
    g = torch.tensor([[2.0, 1.0], [0.5, -1.0]], dtype=torch.float64)

    def apart(basis: Tensor | None, distance: Any) -> Tensor:
        held = [lora(basis if k % 2 else None, k) for k in range(5)]
        told = [ClientUpdate(str(k), 1.0, Message({"params": Bundle(one)})) for k, one in enumerate(held)]
        return Krum(distance=distance).distances(told, around_lora())

    torch.testing.assert_close(apart(g, "product"), apart(None, "product"), rtol=1e-12, atol=1e-12)
    assert float((apart(g, "factors") - apart(None, "factors")).abs().max()) > 1
    x, y = (pairs(lora(seed=k), lambda rank: 4 / rank) for k in (0, 1))
    dense = sum(float((x[m].product() - y[m].product()).square().sum()) for m in x)
    assert float(apart(None, "product")[0, 1]) == pytest.approx(dense, rel=1e-12)
    assert isinstance(x["m0"], Factors)


@pytest.mark.parametrize("rule", [Krum, MultiKrum, Bulyan])
def test_who_is_chosen_by_products_is_chosen_in_any_basis(rule: Any) -> None:
    far = torch.tensor([[100.0, 0.0], [0.0, 0.01]], dtype=torch.float64)
    held = [
        ClientUpdate(str(k), 1.0, Message({"params": Bundle({n: t + 0.01 * k for n, t in lora().items()})}))
        for k in range(7)
    ]
    moved = [*held[:3], ClientUpdate("3", 1.0, Message({"params": Bundle(lora(far))})), *held[4:]]
    plain = [ClientUpdate("3", 1.0, Message({"params": Bundle(lora())})) if u.client == "3" else u for u in held]
    weights = [rule(distance="product").choose(some, around_lora()).weights for some in (moved, plain)]
    assert weights[0] == weights[1]
    assert rule().choose(moved, around_lora()).weights[3] == 0.0


def test_the_choice_on_the_shared_weights_holds_for_every_group() -> None:
    held = []
    for k, point in enumerate(POINTS):
        more = Bundle({"v": torch.full((3,), float(k))}, {"number": float(k)})
        params = Bundle({"w": torch.tensor(point, dtype=torch.float64)})
        held.append(ClientUpdate(f"c{k}", 1.0, Message({"params": params, "control": more})))
    chosen = next(k for k, w in enumerate(Krum().choose(held, bare_around()).weights) if w)
    found = Krum().combine(held, bare_around()).groups["control"]
    assert found.tensors["v"].tolist() == [float(chosen)] * 3
    assert found.scalars == {"number": float(chosen)}
    assert Median().combine(held, bare_around()).groups["control"].scalars == {"number": 2.0}
    assert MultiKrum().combine(held, bare_around()).groups["control"].scalars == {"number": 1.5}


@pytest.mark.parametrize("rule", [Mean(), *RULES], ids=["mean", *NAMES])
def test_results_have_at_least_float32(rule: Aggregator) -> None:
    held = [
        ClientUpdate(str(k), 1.0, Message({"params": Bundle({"w": torch.full((4,), k / 7, dtype=torch.bfloat16)})}))
        for k in range(7)
    ]
    assert rule.combine(held, bare_around()).groups["params"].tensors["w"].dtype == torch.float32
