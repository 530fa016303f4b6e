"""Clients of different ranks, by hand on bare tensors: HetLoRA, HLoRA and FlexLoRA; and changes of basis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import pytest
import torch
from tests.algorithms.by_hand import LAYERS, Federation, adapter, close, drive, federation, ranks, size, wander
from torch import Tensor

from fedloom import factors
from fedloom.algorithms import Algorithm
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedex import FedEx
from fedloom.algorithms.flexlora import FlexLora
from fedloom.algorithms.flora import Flora
from fedloom.algorithms.hetlora import HetLora
from fedloom.algorithms.hlora import HLora
from fedloom.factors import Factors
from fedloom.server.aggregate import Aggregator, Around, Mean
from fedloom.server.optim import FedAvgM
from fedloom.server.robust.clipping import CenteredClipping, NormBound
from fedloom.server.robust.coordinates import Median
from fedloom.server.robust.foolsgold import FoolsGold
from fedloom.server.robust.krum import Krum
from fedloom.types import Bundle, ClientUpdate, Fit, Message, Tensors

SIZES = {"a": 2, "b": 3, "c": 5}
MIXED = {"a": {"q": 1, "v": 2}, "b": {"q": 3, "v": 1}, "c": {"q": 2, "v": 3}}
STILL = HetLora(prune_penalty=0.0)
WHOLE = 4


def mixed(algorithm: Algorithm, whole: int = WHOLE, **server: object) -> Federation:
    return federation(algorithm, SIZES, ranks(whole, MIXED), adapter(whole), **server)


def naive(found: Federation) -> dict[str, Tensor]:
    """Return the mean of padded factors, weighted by norms, from the equations: everything dense."""
    products = {
        n: {m: 4 / len(p[f"{m}.lora_A"]) * p[f"{m}.lora_B"] @ p[f"{m}.lora_A"] for m in LAYERS}
        for n, p in found.ended.items()
    }
    norms = {n: math.sqrt(sum(float(w.square().sum()) for w in of.values())) for n, of in products.items()}
    total, mean = sum(norms.values()), {}
    for m, (d_out, d_in) in LAYERS.items():
        a, b = torch.zeros(WHOLE, d_in, dtype=torch.float64), torch.zeros(d_out, WHOLE, dtype=torch.float64)
        for n, p in found.ended.items():
            r = len(p[f"{m}.lora_A"])
            share = norms[n] / total * math.sqrt(WHOLE / r)  # sqrt(s_k / s), s = alpha / rank
            a[:r] += share * p[f"{m}.lora_A"]
            b[:, :r] += share * p[f"{m}.lora_B"]
        mean[f"{m}.lora_A"], mean[f"{m}.lora_B"] = a, b
    return mean


def test_hetlora_averages_padded_factors_by_norm() -> None:
    found = mixed(STILL)
    for _ in range(3):
        found.round()
        close(found.state.params, naive(found))


def test_hetlora_sends_and_gets_what_a_client_has_room_for() -> None:
    found = mixed(STILL)
    for _ in range(2):
        found.round()
        for update in found.updates:
            expected = sum(8 * MIXED[update.client][m] * (d_out + d_in) for m, (d_out, d_in) in LAYERS.items())
            assert size(found.down[update.client]) == size(update.message) == expected


def test_rows_that_no_client_has_are_zero() -> None:
    for server in ({}, {"optimizer": FedAvgM(), "lr": 0.7}):
        found = mixed(STILL, 6, **server)
        for _ in range(3):
            found.round()
            for module in LAYERS:  # the largest rank is 3 in either
                assert not found.state.params[f"{module}.lora_A"][3:].any()
                assert not found.state.params[f"{module}.lora_B"][:, 3:].any()
                assert found.state.params[f"{module}.lora_A"][:3].all()


def test_rows_that_the_cohort_lacks_are_left_alone() -> None:
    found = mixed(STILL)
    found.round()
    before = found.state.params
    found.round(cohort=["a"])  # ranks 1 and 2; the largest are 3 and 3
    after = found.state.params
    assert torch.equal(after["q.lora_A"][1:3], before["q.lora_A"][1:3])
    assert torch.equal(after["v.lora_B"][:, 2:], before["v.lora_B"][:, 2:])
    assert not torch.equal(after["q.lora_A"][:1], before["q.lora_A"][:1])


@pytest.mark.parametrize("rank", [WHOLE, 2])
def test_a_lone_client_gets_back_what_it_sent(rank: int) -> None:
    lora = ranks(WHOLE, {"a": dict.fromkeys(LAYERS, rank)})
    found = federation(STILL, {"a": 4}, lora, adapter(WHOLE))
    for _ in range(3):
        found.round()
        close(found.algorithm.broadcast(found.server, found.state, "a").groups["params"].tensors, found.ended["a"])
        close(found.global_product(), found.ideal())


def test_equal_ranks_and_norms_are_fedavg() -> None:
    def orthogonal(name: str, round_: int, effect: Fit) -> Tensors:
        """Turn the start by an angle of the client's own: all norms stay equal."""
        ended = wander("all", round_, effect)
        for key in [key for key in ended if key.endswith("lora_A")]:
            turn = torch.linalg.qr(wander(name, round_, Fit({key: torch.eye(ended[key].shape[1]).double()}))[key]).Q
            ended[key] = ended[key] @ turn
        return ended

    lora = ranks(3)
    het = federation(STILL, SIZES, lora, adapter(3))
    plain = federation(FedAvg(weighting="uniform"), SIZES, lora, adapter(3))
    for _ in range(2):
        het.round(orthogonal)
        plain.round(orthogonal)
        close(het.state.params, plain.state.params)
        assert len({round(_norm(p), 9) for p in het.ended.values()}) == 1
    assert not torch.allclose(het.ended["a"]["q.lora_A"], het.ended["b"]["q.lora_A"])


def test_without_norms_equal_ranks_are_fedavg() -> None:
    lora = ranks(3)
    het = federation(HetLora(prune_penalty=0.0, by_norm=False), SIZES, lora, adapter(3))
    plain = federation(FedAvg(), SIZES, lora, adapter(3))
    for _ in range(3):
        het.round()
        plain.round()
    close(het.state.params, plain.state.params)


class Noted(Mean):
    """Keeps what it combined."""

    def combine(self, updates: Iterable[ClientUpdate], around: Around) -> Message:
        NOTED[:] = list(updates)
        return super().combine(NOTED, around)


NOTED: list[ClientUpdate] = []


def test_the_aggregator_gets_changes_of_one_shape() -> None:
    """So any rule, and any server optimiser, goes with ranks of all kinds."""
    found = mixed(STILL, aggregator=Noted())
    found.round()
    before = found.state.params
    found.round()
    for update, (name, own) in zip(NOTED, found.ended.items(), strict=True):
        change = update.message.groups["params"].tensors
        assert {key: t.shape for key, t in change.items()} == {key: t.shape for key, t in before.items()}
        ended = {key: t + before[key] for key, t in change.items()}
        for m in LAYERS:
            padded = factors.resized(Factors(own[f"{m}.lora_A"], own[f"{m}.lora_B"]), WHOLE)
            ratio = math.sqrt(WHOLE / MIXED[name][m])
            torch.testing.assert_close(ended[f"{m}.lora_A"], ratio * padded.a, rtol=0, atol=1e-12)
            torch.testing.assert_close(ended[f"{m}.lora_B"], ratio * padded.b, rtol=0, atol=1e-12)
        assert update.weight == pytest.approx(_norm(own), rel=1e-12)


@pytest.mark.parametrize(
    "rule", [Krum(f=0, distance="product"), Median(), CenteredClipping(), FoolsGold(), NormBound()]
)
def test_hetlora_goes_with_robust_rules(rule: Aggregator) -> None:
    found = mixed(STILL, aggregator=rule)
    for _ in range(3):
        found.round()
    if isinstance(rule, Krum):
        assert any(
            torch.allclose(
                found.state.params["q.lora_A"][:1], math.sqrt(WHOLE / len(p["q.lora_A"])) * p["q.lora_A"][:1]
            )
            for p in found.ended.values()
        )
    assert all(bool(torch.isfinite(t).all()) for t in found.state.params.values())


def test_the_order_of_the_clients_does_not_matter() -> None:
    # the signs of singular vectors are arbitrary, and what wanders from them is not: one round
    for algorithm, rounds in ((STILL, 2), (HetLora(gamma=0.7, prune_penalty=1.0), 2), (FlexLora(), 1), (HLora(), 1)):
        one, other = mixed(algorithm), mixed(algorithm)
        for _ in range(rounds):
            one.round()
            other.round(cohort=["c", "a", "b"])
        close(one.global_product(), other.global_product())


def shrink(name: str, round_: int, effect: Fit) -> Tensors:
    """Make the adapter smaller, so that every tail falls."""
    return {key: 0.5 * t if round_ else t + 0.1 for key, t in effect.start.items()}


def test_a_tail_that_fell_is_given_up_for_good() -> None:
    found = mixed(HetLora(gamma=0.7, prune_penalty=1.0))
    found.round(shrink)  # B was zero: no tail can have fallen
    assert "ranks" not in found.state.slots
    found.round(shrink)
    expected = {"a": {"q": 1, "v": 1}, "b": {"q": 2, "v": 1}, "c": {"q": 1, "v": 2}}
    for update in found.updates:
        for module, rank in expected[update.client].items():
            assert len(update.message.groups["params"].tensors[f"{module}.lora_A"]) == rank
        known = found.algorithm.trained(found.server, replace(found.state), update)
        assert known is not None
        assert found.algorithm.ranks(found.server, found.state, update.client) == expected[update.client]  # type: ignore[attr-defined]
    for module in LAYERS:  # what nobody has any more is gone
        assert not found.state.params[f"{module}.lora_A"][2:].any()
    found.round(cohort=["b"])
    assert len(found.down["b"].groups["params"].tensors["q.lora_A"]) == 2
    assert found.updates[0].metrics["rank"] == 1.5
    found.round(shrink)
    assert len(found.updates[2].message.groups["params"].tensors["v.lora_A"]) == 1


def test_pruning_keeps_the_product_of_what_is_left() -> None:
    found = federation(HetLora(gamma=0.7, prune_penalty=1.0), {"a": 1}, ranks(3), adapter(3))
    found.round(lambda name, round_, effect: {key: t + 0.1 for key, t in effect.start.items()})
    found.round(shrink)
    (params,) = found.algorithm.export(found.state).values()
    for m in LAYERS:
        left = factors.resized(factors.pairs(found.ended["a"], lambda r: 4 / r)[m], 2).product()
        torch.testing.assert_close(factors.pairs(params, lambda r: 4 / r)[m].product(), left, rtol=0, atol=1e-12)


def test_the_penalty_pairs_every_b_with_its_own_a() -> None:
    params = {name: t.requires_grad_() for name, t in adapter(3, b=1.0).items()}
    penalty = HetLora(gamma=0.7, prune_penalty=0.5).penalty(params)
    assert penalty is not None
    value = penalty(params)
    expected = sum(0.5 * params[f"{m}.lora_A"][2:].norm() * params[f"{m}.lora_B"][:, 2:].norm() for m in LAYERS)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    value.backward()
    for m in LAYERS:
        a, b = params[f"{m}.lora_A"], params[f"{m}.lora_B"]
        assert not a.grad[:2].any()
        torch.testing.assert_close(a.grad[2:], 0.5 * b[:, 2:].norm() * a[2:] / a[2:].norm())
        torch.testing.assert_close(b.grad[:, 2:], 0.5 * a[2:].norm() * b[:, 2:] / b[:, 2:].norm())


def test_the_penalty_has_a_gradient_at_zero() -> None:
    params = {name: t.requires_grad_() for name, t in adapter(3).items()}
    penalty = HetLora().penalty(params)
    assert penalty is not None
    penalty(params).backward()
    assert all(not t.grad.any() for t in params.values())


def test_no_penalty_where_there_is_no_tail() -> None:
    assert HetLora().penalty(adapter(1)) is None
    assert HetLora(prune_penalty=0.0).penalty(adapter(3)) is None
    assert HetLora(gamma=0.9).kept(adapter(10, b=1.0), adapter(10, b=0.5)) == dict.fromkeys(LAYERS, 9)
    assert HetLora(gamma=0.1).kept(adapter(3, b=1.0), adapter(3, b=0.5)) == dict.fromkeys(LAYERS, 1)


def test_clients_without_any_product_weigh_the_same() -> None:
    found = mixed(STILL)
    found.round(lambda name, round_, effect: effect.start)
    assert all(bool(torch.isfinite(t).all()) for t in found.state.params.values())


def test_hlora_with_one_rank_leaves_out_the_scale() -> None:
    """With one rank at all clients s cancels: W = sum_k p_k B_k A_k, as its paper writes it."""
    found = federation(HLora(), SIZES, ranks(5), adapter(5))
    found.round()
    for m in LAYERS:
        w = sum(n / 10 * found.ended[c][f"{m}.lora_B"] @ found.ended[c][f"{m}.lora_A"] for c, n in SIZES.items())
        u, s, vh = torch.linalg.svd(w)
        best = u[:, :5] @ torch.diag(s[:5]) @ vh[:5]
        torch.testing.assert_close(
            found.state.params[f"{m}.lora_B"] @ found.state.params[f"{m}.lora_A"], best, rtol=0, atol=1e-12
        )


def test_hlora_and_flexlora_agree() -> None:
    one, other = mixed(HLora()), mixed(FlexLora())
    for _ in range(2):
        one.round()
        other.round()
    close(one.state.params, other.state.params, atol=0)


def test_flexlora_with_room_for_all_is_exact_at_mixed_ranks() -> None:
    found = mixed(FlexLora(), 6)
    for _ in range(2):
        found.round()
        close(found.global_product(), found.ideal())
        for name, message in found.down.items():
            expected = sum(8 * MIXED[name][m] * (d_out + d_in) for m, (d_out, d_in) in LAYERS.items())
            assert size(message) == expected


def test_flexlora_loses_the_singular_values_beyond_its_rank() -> None:
    found = federation(FlexLora(), SIZES, ranks(3), adapter(3))
    found.round()
    for m, ideal in found.ideal().items():
        lost = torch.linalg.svdvals(ideal)[3:].norm()
        assert lost > 1e-2
        torch.testing.assert_close((found.global_product()[m] - ideal).norm(), lost, rtol=0, atol=1e-12)


def turned(params: Tensors, seed: int) -> dict[str, Tensor]:
    """Return the adapter in another basis: B G^-1, G A."""
    stream, new = torch.Generator().manual_seed(seed), {}
    for module in {name.rpartition(".")[0] for name in params}:
        a, b = params[f"{module}.lora_A"], params[f"{module}.lora_B"]
        basis = torch.randn(len(a), len(a), generator=stream, dtype=a.dtype)
        new[f"{module}.lora_A"], new[f"{module}.lora_B"] = basis @ a, b @ torch.linalg.inv(basis)
    return new


@pytest.mark.parametrize("algorithm", [FlexLora(), HLora(), Flora(), FedEx(), FedAvg()])
def test_what_a_change_of_the_clients_basis_does(algorithm: Algorithm) -> None:
    """(B, A) -> (B G^-1, G A) is the same model; only averaging factors tells the two apart."""
    lora, results = ranks(3), []
    for turn in (False, True):
        found = federation(algorithm, SIZES, lora, adapter(3))

        def solve(name: str, round_: int, effect: Fit, turn: bool = turn) -> Tensors:
            ended = wander(name, round_, effect)
            return turned(ended, ord(name)) if turn else ended

        found.round(solve)
        results.append(_model(found))
    apart = max(float((results[0][m] - results[1][m]).abs().max()) for m in LAYERS)
    assert apart > 1e-2 if algorithm == FedAvg() else apart < 1e-9


def _model(found: Federation) -> dict[str, Tensor]:
    """Return module -> the whole change of its weight: merges and adapter."""
    total = found.global_product()
    for merge in found.state.base:
        for m in LAYERS:
            total[m] = total[m] + Factors(merge.tensors[f"{m}.lora_A"], merge.tensors[f"{m}.lora_B"]).product()
    return total


def _norm(params: Mapping[str, Tensor]) -> float:
    return math.hypot(*(factors.norm(pair) for pair in factors.pairs(params, lambda r: 4 / r).values()))


def test_an_update_of_other_names_is_refused() -> None:
    found = mixed(STILL)
    found.round()
    odd = replace(found.updates[0], message=Message({"params": Bundle({"q.lora_A": torch.zeros(1, 9)})}))
    with pytest.raises(ValueError, match="not LoRA factors in pairs"):
        drive(STILL.combine(found.server, found.state, [odd]))
