"""q-FedAvg and AFL: neutral settings, the equations, the optima they promise, and the simplex."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.algorithms.quadratics import Curve, drive, federate, one_round
from tests.bare import bare_server
from tests.helpers import MODEL, adapter, lines, run, same

import fedloom
from fedloom import recipe as recipes
from fedloom import tensors
from fedloom.algorithms.afl import Afl, simplex
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.qfedavg import QFedAvg
from fedloom.checkpoint import Checkpoints
from fedloom.runtime.engine import Engine
from fedloom.server.optim import FedAvgM
from fedloom.types import Fit, Message, RecipeError, Score, ServerState
from fedloom.wire import codec

CURVES = {"a": Curve(1.0, 0.0, lr=0.05), "b": Curve(3.0, 2.0, lr=0.05)}
MINIMAX = 2 * math.sqrt(3) / (1 + math.sqrt(3))
"""Where 1/2 w^2 = 3/2 (w - 2)^2 between the minima: the least worst loss."""
AVERAGE = 1.5
"""Where w + 3 (w - 2) = 0: the least mean loss."""
SGD = {"optimizer": "sgd", "lr": 0.1}
SERVER = bare_server(("a", "b"))


def weight(state: ServerState) -> float:
    return float(state.params["w"])


# q-FedAvg


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_q_of_zero_is_fedavg_bit_for_bit(weighting: str, tiny_folder: Path, tmp_path: Path) -> None:
    plain = run(tiny_folder, tmp_path / "a", algorithm={"name": "fedavg", "weighting": weighting})
    fair = run(tiny_folder, tmp_path / "b", algorithm={"name": "qfedavg", "q": 0, "weighting": weighting})
    assert same(adapter(plain), adapter(fair))


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0, 3.0])
def test_a_round_is_the_equations(q: float) -> None:
    """As the paper writes them: gradients L (w - w_k), and L in both sums."""
    curves = {"a": Curve(1.0, -1.0, steps=3, lr=0.05), "b": Curve(3.0, 2.0, steps=3, lr=0.05)}
    tops, heights = [], []
    for curve in curves.values():
        w_k = curve.target * (1 - (1 - curve.lr * curve.slope) ** 3)
        gradient, loss, bound = (0.0 - w_k) / curve.lr, curve.loss(0.0), 1 / curve.lr
        tops.append(loss**q * gradient)
        heights.append(q * loss ** (q - 1) * gradient**2 + bound * loss**q)
    state = federate(QFedAvg(q=q), SERVER, curves, 1)
    assert weight(state) == pytest.approx(-sum(tops) / sum(heights), rel=1e-12)


@pytest.mark.parametrize("q", [1.0, 2.0])
def test_it_reaches_the_optimum_of_the_powered_losses(q: float) -> None:
    state = federate(QFedAvg(q=q), SERVER, CURVES, 4000, start=1.0)
    w = weight(state)
    slope = sum(c.loss(w) ** q * c.slope * (w - c.target) for c in CURVES.values())
    assert slope == pytest.approx(0, abs=1e-9)
    assert MINIMAX < w < AVERAGE


def test_losses_are_more_even_the_larger_q() -> None:
    def spread(q: float) -> float:
        w = weight(federate(QFedAvg(q=q), SERVER, CURVES, 4000, start=1.0))
        losses = [c.loss(w) for c in CURVES.values()]
        return max(losses) - min(losses)

    spreads = [spread(q) for q in (0.0, 0.5, 2.0, 8.0)]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] < 0.25 * spreads[0]


def test_a_loss_of_zero_is_no_division_by_zero() -> None:
    curves = {"a": Curve(1.0, 0.0), "b": Curve(1.0, 1.0)}
    for q in (0.5, 1.0, 2.0):
        assert 0 < weight(federate(QFedAvg(q=q), SERVER, curves, 1)) < 1


def test_a_given_lipschitz_bound_takes_the_rates_place() -> None:
    by_rate = federate(QFedAvg(q=1.5), SERVER, CURVES, 3, start=1.0)
    given_ = federate(QFedAvg(q=1.5, lipschitz=20), SERVER, CURVES, 3, start=1.0)
    assert weight(given_) == pytest.approx(weight(by_rate), rel=1e-14)
    assert weight(federate(QFedAvg(q=1.5, lipschitz=200), SERVER, CURVES, 3, start=1.0)) != weight(by_rate)


def test_it_refuses_adaptive_clients_without_a_bound() -> None:
    tree: dict[str, Any] = {"algorithm": {"name": "qfedavg"}, "trainer": {"optimizer": "adamw"}}
    message = (
        r"trainer\.optimizer=adamw: algorithm\.lipschitz=null.*set trainer\.optimizer=sgd, or algorithm\.lipschitz"
    )
    with pytest.raises(RecipeError, match=message):
        recipes.load(tree)
    recipes.load(tree, ["algorithm.lipschitz=1"])
    recipes.load(tree, ["algorithm.q=0"])


# AFL


def test_afl_reaches_the_least_worst_loss() -> None:
    """Both losses are equal there, and lambda is what makes it stationary; FedAvg ends at the least mean."""
    afl = Afl(gamma=0.05)
    state = federate(afl, SERVER, CURVES, 4000, start=1.0)
    assert weight(state) == pytest.approx(MINIMAX, abs=1e-9)
    assert CURVES["a"].loss(weight(state)) == pytest.approx(CURVES["b"].loss(weight(state)), abs=1e-9)
    mixture = afl.mixture(SERVER, state)
    assert mixture["a"] * MINIMAX == pytest.approx(mixture["b"] * 3 * (2 - MINIMAX), abs=1e-8)
    plain = federate(FedAvg(weighting="uniform"), SERVER, CURVES, 4000, start=1.0)
    assert weight(plain) == pytest.approx(AVERAGE, abs=1e-9)


def test_afl_round_by_round_is_the_equations() -> None:
    """Descent and projected ascent in plain numbers, with the losses before the step."""
    w, mixture, state, afl = 1.0, {"a": 0.5, "b": 0.5}, None, Afl(gamma=0.3)
    for rounds in range(1, 8):
        losses = {n: c.loss(w) for n, c in CURVES.items()}
        w -= sum(mixture[n] * 0.05 * c.slope * (w - c.target) for n, c in CURVES.items())
        high, low = (mixture[n] + 0.3 * losses[n] for n in ("a", "b"))
        share = min(1.0, max(0.0, (1 + high - low) / 2))  # two numbers on a simplex
        mixture = {"a": share, "b": 1 - share}
        state = federate(afl, SERVER, CURVES, rounds, start=1.0)
        assert weight(state) == pytest.approx(w, abs=1e-13)
        assert afl.mixture(SERVER, state) == pytest.approx(mixture, abs=1e-13)
    assert state is not None


def test_a_still_mixture_is_uniform_fedavg(tiny_folder: Path, tmp_path: Path) -> None:
    plain = run(tiny_folder, tmp_path / "a", algorithm={"name": "fedavg", "weighting": "uniform"})
    fair = run(tiny_folder, tmp_path / "b", algorithm={"name": "afl", "gamma": 0})
    a, b = adapter(plain), adapter(fair)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-7)


def test_a_cohort_of_some_raises_its_own_weights() -> None:
    """Two of three clients: their losses count N/K times, the absent one's not at all."""
    three = bare_server(("a", "b", "c"))
    state = Afl().init({"w": torch.ones(1, dtype=torch.float64)})
    after, _ = one_round(Afl(gamma=0.1), three, state, CURVES, {})
    raised = [1 / 3 + 0.1 * 1.5 * CURVES["a"].loss(1.0), 1 / 3 + 0.1 * 1.5 * CURVES["b"].loss(1.0), 1 / 3]
    excess = (sum(raised) - 1) / 3
    assert Afl().mixture(three, after) == pytest.approx(
        dict(zip("abc", [r - excess for r in raised], strict=True)), abs=1e-14
    )


def test_clients_out_of_the_mixture_leave_the_weights_and_come_back() -> None:
    """A large gamma puts all weight on one client; a round of the other alone moves no weight but its lambda."""
    afl = Afl(gamma=10.0)
    state = afl.init({"w": torch.ones(1, dtype=torch.float64)})
    state, _ = one_round(afl, SERVER, state, CURVES, {})
    assert afl.mixture(SERVER, state) == {"a": 0.0, "b": 1.0}
    after, _ = one_round(afl, SERVER, state, {"a": CURVES["a"]}, {})
    assert torch.equal(after.params["w"], state.params["w"])
    assert afl.mixture(SERVER, after)["a"] > 0.9
    both, _ = one_round(afl, SERVER, state, CURVES, {})
    alone = weight(state) - 0.05 * 3 * (weight(state) - 2)
    assert weight(both) == pytest.approx(alone, abs=1e-14)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=1, max_size=9))
def test_the_simplex_projection_is_the_nearest_point(values: list[float]) -> None:
    """The threshold found by bisection instead: sum max(0, v - t) = 1."""
    low, high = min(values) - 1, max(values)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(max(0.0, v - middle) for v in values) > 1 else (low, middle)
    found = simplex(values)
    assert found == pytest.approx([max(0.0, v - high) for v in values], abs=1e-9)
    assert sum(found) == pytest.approx(1, abs=1e-9)


def test_the_simplex_in_known_cases() -> None:
    assert simplex([0.5, 0.5]) == [0.5, 0.5]
    assert simplex([3.0]) == [1.0]
    assert simplex([2.0, 0.0, 0.0]) == [1.0, 0.0, 0.0]
    assert simplex([1.0, 0.5, -3.0]) == pytest.approx([0.75, 0.25, 0.0], abs=1e-15)
    assert simplex([-1.0, -1.0, -1.0, -1.0]) == [0.25] * 4


# both


@pytest.mark.parametrize("algorithm", [QFedAvg(), Afl()], ids=lambda a: a.part_name)
def test_the_loss_is_that_of_the_broadcast_weights_on_all_training_rows(algorithm: Any) -> None:
    from fedloom.algorithms import Client

    start = {"w": torch.ones(1, dtype=torch.float64)}
    client = Client("a", 0, {}, 1, 1.0, start, lambda _: {})
    effects: list[Any] = []

    def answer(effect: Any) -> Any:
        effects.append(effect)
        return CURVES["b"].answer(effect)

    update, _ = drive(algorithm.train(client, algorithm.broadcast(SERVER, algorithm.init(start), "a")), answer)
    assert [type(effect) for effect in effects] == [Score, Fit]
    assert effects[0].split == "train"
    assert torch.equal(effects[0].params["w"], start["w"])
    assert update.metrics["loss_at_start"] == 1.5


@pytest.mark.parametrize("algorithm", [QFedAvg(), Afl()], ids=lambda a: a.part_name)
def test_a_server_optimiser_goes_on_top(algorithm: Any) -> None:
    half = bare_server(("a", "b"), optimizer=FedAvgM(), lr=0.5)
    moved = [weight(federate(algorithm, server, CURVES, 1, start=1.0)) - 1 for server in (SERVER, half)]
    assert moved[1] == pytest.approx(0.5 * moved[0], rel=1e-14)


@pytest.mark.parametrize("algorithm", ["qfedavg", "afl"])
def test_the_order_of_clients_does_not_matter(algorithm: str) -> None:
    from fedloom.algorithms import Algorithm

    part, curves = Algorithm.resolve(algorithm), {**CURVES, "c": Curve(2.0, -1.0, lr=0.05)}
    ways = (curves, dict(reversed(curves.items())))
    there, back = (weight(federate(part, bare_server(tuple(way)), way, 3, start=1.0)) for way in ways)  # type: ignore[arg-type]
    assert there == pytest.approx(back, abs=1e-14)


@pytest.mark.parametrize("algorithm", ["qfedavg", "afl"])
def test_two_rounds_resume_and_bytes(algorithm: str, tiny_folder: Path, tmp_path: Path) -> None:
    changes = {"algorithm": algorithm, "trainer": SGD, "sampler": {"count": 2}}
    sent: list[Message] = []
    real = Engine.train

    def train(self: Any, round_: int, errands: Any) -> Any:
        replies = real(self, round_, errands)
        sent.extend(Message(codec.decode(reply.message)) for reply in replies)
        return replies

    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(Engine, "train", train)
        whole = run(tiny_folder, tmp_path / "a", **changes, rounds=3)
    size = tensors.nbytes(adapter(whole))
    payload = [sum(tensors.nbytes(bundle.tensors) for bundle in message.groups.values()) for message in sent]
    assert payload == [size + 8] * 6
    run(tiny_folder, tmp_path / "b", **changes, rounds=1)
    longer = fedloom.resume(tmp_path / "b", ["rounds=3"])
    assert longer.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    assert longer.summary["metrics"] == whole.summary["metrics"]
    found = {line["name"] for line in lines(whole.folder / "metrics.jsonl")}
    assert "loss_at_start" in found
    assert "aggregation_error" not in found
    state, _ = Checkpoints(whole.folder / "checkpoints", 2).load(3)
    kept = state.slots["mixture"].scalars if algorithm == "afl" else {"one": 1.0}
    assert sum(kept.values()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("algorithm", ["qfedavg", "afl"])
def test_in_processes_it_is_the_same(algorithm: str, tiny_folder: Path, tmp_path: Path) -> None:
    changes = {"algorithm": algorithm, "trainer": SGD}
    here = run(tiny_folder, tmp_path / "a", **changes)
    there = run(tiny_folder, tmp_path / "b", **changes, runtime={"name": "processes", "workers": 2, "threads": 1})
    assert there.summary["adapter_sha256"] == here.summary["adapter_sha256"]


@pytest.mark.parametrize("algorithm", ["qfedavg", "afl", "fednova", "diloco"])
def test_each_has_a_recipe_of_its_name(algorithm: str, tiny_folder: Path, tmp_path: Path) -> None:
    small = ["rounds=1", "data.source.rows_per_category=2", "runtime.threads=1"]
    tiny = {"model": {"name": str(tiny_folder), **MODEL}, "data": {"max_tokens": 2000}, "evaluate": []}
    assert fedloom.run(algorithm, *small, out=tmp_path / "a", **tiny).recipe.algorithm.part_name == algorithm


@pytest.mark.parametrize("algorithm", ["qfedavg", "afl"])
def test_other_aggregators_are_refused(algorithm: str) -> None:
    from fedloom.server.aggregate import Aggregator

    other = next((name for name in sorted(Aggregator.known) if name != "mean"), None)
    if other is None:
        pytest.skip("there is no other aggregator")
    with pytest.raises(RecipeError, match=f"server.aggregator={other}: algorithm={algorithm} combines updates itself"):
        recipes.load({"algorithm": algorithm, "trainer": SGD, "server": {"aggregator": other}, "data": {"clients": 9}})
