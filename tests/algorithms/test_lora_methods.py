"""Methods that move one factor of LoRA at a time, by hand on bare tensors: FFA-LoRA, RoLoRA, FedSA-LoRA, FedSVD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from tests.algorithms.by_hand import LAYERS, Federation, adapter, close, drive, federation, names, ranks, size, wander
from torch import Tensor

from fedloom import tensors
from fedloom.algorithms import Algorithm
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedsa import FedSaLora
from fedloom.algorithms.fedsvd import FedSvd
from fedloom.algorithms.ffa import FfaLora
from fedloom.algorithms.halves import half
from fedloom.algorithms.rolora import RoLora
from fedloom.server.aggregate import Aggregator, Around, Mean
from fedloom.server.optim import FedAdam, FedAvgM
from fedloom.server.robust.clipping import CenteredClipping, NormBound
from fedloom.server.robust.coordinates import Median
from fedloom.server.robust.foolsgold import FoolsGold
from fedloom.server.robust.krum import Krum
from fedloom.types import Bundle, ClientUpdate, Fit, Message, Score, Tensors

RANK = 3
SIZES = {"a": 2, "b": 3, "c": 5}
UP = {
    "lora_A": sum(8 * RANK * d_in for _, d_in in LAYERS.values()),
    "lora_B": sum(8 * RANK * d for d, _ in LAYERS.values()),
}
BOTH = UP["lora_A"] + UP["lora_B"]


def begun(algorithm: Algorithm, **server: object) -> Federation:
    return federation(algorithm, SIZES, ranks(RANK), adapter(RANK), **server)


@pytest.mark.parametrize("algorithm", [FfaLora(), RoLora(), FedSvd()])
def test_the_new_product_is_the_mean_of_the_products(algorithm: Algorithm) -> None:
    found = begun(algorithm)
    for _ in range(4):
        found.round()
        close(found.global_product(), found.ideal())
    plain = begun(FedAvg())
    plain.round()
    plain.round()
    apart = max(float((plain.global_product()[m] - plain.ideal()[m]).abs().max()) for m in LAYERS)
    assert apart > 1e-3


@pytest.mark.parametrize("algorithm", [FfaLora(), RoLora(), FedSvd(), FedSaLora()])
def test_the_order_of_the_clients_does_not_matter(algorithm: Algorithm) -> None:
    one, other = begun(algorithm), begun(algorithm)
    for _ in range(3):
        one.round()
        other.round(cohort=["c", "a", "b"])
    close(one.state.params, other.state.params)


@pytest.mark.parametrize("algorithm", [FfaLora(), RoLora(), FedSvd()])
def test_the_server_knows_what_a_client_ended_with(algorithm: Algorithm) -> None:
    found = begun(algorithm)
    for _ in range(3):
        before = found.state
        found.round()
        for update in found.updates:
            known = algorithm.trained(found.server, replace(before, seen={}), update)
            assert known is not None
            close(known, found.ended[update.client])


def test_ffa_freezes_a_and_sends_b_alone() -> None:
    found, first = begun(FfaLora()), half(adapter(RANK), "lora_A")
    for _ in range(3):
        found.round()
        for message in (*found.down.values(), *(update.message for update in found.updates)):
            assert names(message) == set(half(found.initial, "lora_B"))
            assert size(message) == UP["lora_B"]
        for params in (*found.ended.values(), found.state.params):
            assert all(torch.equal(params[name], t) for name, t in first.items())
    assert all(float(t.abs().max()) > 0 for t in half(found.state.params, "lora_B").values())


def test_ffa_is_fedavg_with_a_held_still() -> None:
    def b_alone(name: str, round_: int, effect: Fit) -> Tensors:
        return wander(name, round_, replace(effect, trainable=lambda key: key.endswith("lora_B")))

    ffa, plain = begun(FfaLora()), begun(FedAvg())
    for _ in range(3):
        ffa.round()
        plain.round(b_alone)
    assert all(torch.equal(ffa.state.params[name], t) for name, t in plain.state.params.items())


@pytest.mark.parametrize("optimizer", [FedAdam(), FedAvgM()])
def test_ffa_goes_with_server_optimisers(optimizer: FedAdam | FedAvgM) -> None:
    def b_alone(name: str, round_: int, effect: Fit) -> Tensors:
        return wander(name, round_, replace(effect, trainable=lambda key: key.endswith("lora_B")))

    ffa, plain = (begun(one, optimizer=optimizer, lr=0.3) for one in (FfaLora(), FedAvg()))
    for _ in range(3):
        ffa.round()
        plain.round(b_alone)
    close(ffa.state.params, plain.state.params)


def test_rolora_takes_turns_from_b_on() -> None:
    found = begun(RoLora())
    for round_ in range(5):
        factor, other = ("lora_A", "lora_B") if round_ % 2 else ("lora_B", "lora_A")
        before = found.state.params
        after = found.round().params
        for params in (*found.ended.values(), after):
            assert all(torch.equal(params[name], t) for name, t in half(before, other).items())
        assert not any(torch.equal(after[name], t) for name, t in half(before, factor).items())
        for update in found.updates:
            assert names(update.message) == set(half(before, factor))
            assert size(update.message) == UP[factor]
        for message in found.down.values():
            assert size(message) == (UP[other] if round_ else BOTH)


def test_rolora_sends_both_factors_to_whoever_was_away() -> None:
    found, plain = begun(RoLora()), begun(RoLora())
    cohorts = [["a", "b"], ["a", "c"], ["a", "b"], ["b", "c"], ["a", "b", "c"]]
    away = {(0, "a"), (0, "b"), (1, "c"), (2, "b"), (3, "c"), (4, "a")}
    for round_, cohort in enumerate(cohorts):
        plain.state = replace(plain.state, seen={})
        plain.memories = {}
        found.round(cohort=cohort)
        plain.round(cohort=cohort)
        for name, message in found.down.items():
            halves = UP["lora_B" if round_ % 2 else "lora_A"]
            assert size(message) == (BOTH if (round_, name) in away else halves), (round_, name)
        assert all(torch.equal(found.state.params[name], t) for name, t in plain.state.params.items())


def test_rolora_clients_use_what_the_server_has() -> None:
    """The memory and the message together are the global adapter, in training and at the evaluation after it."""
    found = begun(RoLora())
    for cohort in (["a", "b"], ["a", "b", "c"], ["b"]):
        expected = found.state.params

        def solve(name: str, round_: int, effect: Fit, expected: Tensors = expected) -> Tensors:
            assert all(torch.equal(effect.start[key], t) for key, t in expected.items())
            return wander(name, round_, effect)

        found.round(solve, cohort)
        for name in SIZES:
            message = found.algorithm.broadcast(found.server, found.state, name)
            asked = next(found.algorithm.evaluate(found.client(name), message, "test"))
            assert isinstance(asked, Score)
            assert asked.params is not None
            assert all(torch.equal(asked.params[key], t) for key, t in found.state.params.items())


class Remembers(Mean):
    """Adds what it combined in the round before."""

    def combine(self, updates: object, around: Around) -> Message:
        combined = super().combine(updates, around)  # type: ignore[arg-type]
        delta = combined.groups["params"].tensors
        if around.kept.tensors:
            delta = tensors.add(delta, around.kept.tensors)
        return Message({**combined.groups, "params": Bundle(delta), "aggregator": Bundle(delta)})


def test_rolora_keeps_a_server_state_for_each_factor() -> None:
    """Momentum of B rests while A moves: each factor is as if the other's rounds were not there."""
    both = begun(RoLora(), optimizer=FedAvgM(momentum=0.5), aggregator=Remembers())
    velocity: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    params = dict(both.state.params)
    for _ in range(6):
        both.round()
        mean = Mean().combine(both.updates, both.algorithm.around(both.server, both.state)).groups["params"].tensors
        for name, t in mean.items():
            kept[name] = t + kept.get(name, 0.0)
            velocity[name] = kept[name] + 0.5 * velocity.get(name, 0.0)
            params[name] = params[name] + velocity[name]
        close(both.state.params, params)
    assert set(both.state.slots) == {
        f"{slot}:{factor}" for slot in ("server_optimizer", "aggregator") for factor in ("lora_A", "lora_B")
    }


@pytest.mark.parametrize("algorithm", [FfaLora(), RoLora(), FedSaLora()])
@pytest.mark.parametrize("rule", [Krum(f=0), Median(), CenteredClipping(), FoolsGold(), NormBound()])
def test_robust_rules_see_the_factor_that_moved(algorithm: Algorithm, rule: Aggregator) -> None:
    """Each factor's history is its own: as two federations that take every other round."""
    found = begun(algorithm, aggregator=rule)
    history: dict[str, Bundle] = {}
    for round_ in range(4):
        before = found.state.params
        found.round()
        moved = next(iter(names(found.updates[0].message))).rpartition(".")[2]
        around = replace(
            found.algorithm.around(found.server, found.state), params=before, kept=history.get(moved, Bundle())
        )
        combined = rule.combine(found.updates, replace(around, stream=found.server.stream(round_, "aggregator")))
        history[moved] = combined.groups.get("aggregator", Bundle())
        for name, t in combined.groups["params"].tensors.items():
            torch.testing.assert_close(found.state.params[name], before[name] + t, rtol=0, atol=1e-12)


def test_rolora_with_one_client_is_alternating_training() -> None:
    found = federation(RoLora(), {"a": 4}, ranks(RANK), adapter(RANK))
    alone: Tensors = adapter(RANK)
    for round_ in range(4):
        factor = "lora_A" if round_ % 2 else "lora_B"
        alone = wander("a", round_, Fit(alone, trainable=lambda name, factor=factor: name.endswith(factor)))
        found.round()
        close(found.state.params, alone)


def _regression(target: Tensor) -> object:
    """Minimise ||s B A - target||^2 over the factors that move, exactly: clients all have the same target."""

    def solve(name: str, round_: int, effect: Fit) -> Tensors:
        ended, scale = dict(effect.start), 4.0
        for module in {key.rpartition(".")[0] for key in ended}:
            a, b = ended[f"{module}.lora_A"], ended[f"{module}.lora_B"]
            if effect.trainable is None or effect.trainable(f"{module}.lora_B"):
                ended[f"{module}.lora_B"] = target @ torch.linalg.pinv(a) / scale
            else:
                ended[f"{module}.lora_A"] = torch.linalg.pinv(b) @ target / scale
        return ended

    return solve


def test_rolora_finds_a_matrix_of_its_rank_and_ffa_stops_at_the_angle_of_its_a() -> None:
    """f = ||s B A - u v^T||^2: with A frozen the best residual is |u| |v| sin(angle of A and v)."""
    stream = torch.Generator().manual_seed(3)
    u, v, a = (torch.randn(n, generator=stream, dtype=torch.float64) for n in (7, 9, 9))
    start = {"q.lora_A": a[None], "q.lora_B": torch.zeros(7, 1, dtype=torch.float64)}
    lora = replace(ranks(1), whole={"q": 1}, of=lambda client: {"q": 1})
    residual = {}
    for algorithm in (RoLora(), FfaLora()):
        found = federation(algorithm, {"a": 1, "b": 1}, lora, start)
        for _ in range(3):
            found.round(_regression(torch.outer(u, v)))  # type: ignore[arg-type]
        residual[algorithm.part_name] = float((found.global_product()["q"] - torch.outer(u, v)).norm())
    cosine = float(a @ v / a.norm() / v.norm())
    assert residual["ffa-lora"] == pytest.approx(float(u.norm() * v.norm()) * (1 - cosine**2) ** 0.5, rel=1e-12)
    assert residual["rolora"] < 1e-12


def test_fedsa_shares_a_and_keeps_b() -> None:
    found = begun(FedSaLora())
    for round_ in range(3):
        found.round()
        for message in (*found.down.values(), *(update.message for update in found.updates)):
            assert names(message) == set(half(found.initial, "lora_A"))
            assert size(message) == UP["lora_A"]
        total = sum(SIZES.values())
        for name, t in half(found.state.params, "lora_A").items():
            mean = sum(n / total * found.ended[client][name] for client, n in SIZES.items())
            torch.testing.assert_close(t, mean, rtol=0, atol=1e-12)
        ended = found.ended
        expected = {client: half(ended[client], "lora_B") for client in SIZES}

        def solve(name: str, round_: int, effect: Fit, expected: Mapping[str, Tensors] = expected) -> Tensors:
            close(half(effect.start, "lora_B"), expected[name])
            return wander(name, round_, effect)

        if round_ == 1:
            found.round(solve)


def test_fedsa_has_an_adapter_for_every_client_and_none_for_all() -> None:
    found = begun(FedSaLora())
    found.round(cohort=["a", "b"])
    algorithm, state = found.algorithm, found.state
    assert algorithm.export(state) == {}
    assert algorithm.trained(found.server, state, found.updates[0]) is None
    for name in SIZES:
        (own,) = algorithm.export(state, found.memories.get(name, {})).values()
        close(half(own, "lora_A"), half(state.params, "lora_A"))
        # whoever never trained has B = 0: the untouched base
        b = half(found.ended[name], "lora_B") if name in found.ended else half(found.initial, "lora_B")
        close(half(own, "lora_B"), b)
        asked = next(algorithm.evaluate(found.client(name), algorithm.broadcast(found.server, state, name), "test"))
        assert isinstance(asked, Score)
        assert asked.params is not None
        close(asked.params, own, atol=0)


def test_fedsvd_renews_an_orthonormal_a() -> None:
    found = begun(FedSvd())
    rows = {m: torch.linalg.pinv(found.initial[f"{m}.lora_A"]) @ found.initial[f"{m}.lora_A"] for m in LAYERS}
    for _ in range(4):
        before = found.state
        for m, projector in rows.items():
            a, b = before.params[f"{m}.lora_A"], before.params[f"{m}.lora_B"]
            torch.testing.assert_close(a @ a.T, torch.eye(RANK, dtype=a.dtype), rtol=0, atol=1e-12)
            torch.testing.assert_close(a.T @ a, projector, rtol=0, atol=1e-12)  # the first A's row space
            gram = b.T @ b
            torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-12)
        found.round()
        for name, params in found.ended.items():
            assert all(torch.equal(params[key], t) for key, t in half(before.params, "lora_A").items()), name
        for update in found.updates:
            assert names(update.message) == set(half(found.initial, "lora_B"))
            assert size(update.message) == UP["lora_B"]
        assert all(size(message) == BOTH for message in found.down.values())


def test_fedsvd_is_the_svd_of_the_dense_mean() -> None:
    found = begun(FedSvd())
    for _ in range(2):
        found.round()
        for m in LAYERS:
            dense = sum(
                n / 10 * found.ended[c][f"{m}.lora_B"] @ found.ended[c][f"{m}.lora_A"] for c, n in SIZES.items()
            )
            s = torch.linalg.svdvals(dense)[:RANK]
            b = found.state.params[f"{m}.lora_B"]
            torch.testing.assert_close(b.norm(dim=0), s, rtol=0, atol=1e-12)
            torch.testing.assert_close(b @ found.state.params[f"{m}.lora_A"], dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("algorithm", [FfaLora(), FedSaLora(), RoLora(), FedSvd()])
def test_an_absent_factor_stands_in_no_update(algorithm: Algorithm) -> None:
    found = begun(algorithm)
    found.round()
    factor = "lora_A" if isinstance(algorithm, FedSaLora) else "lora_B"
    odd = ClientUpdate("d", 1.0, Message({"params": Bundle(adapter(RANK))}))
    with pytest.raises(ValueError, match="update of d has other groups or "):
        drive(algorithm.combine(found.server, found.state, [*found.updates, odd]))
    assert all(name.endswith(factor) for update in found.updates for name in names(update.message))
