"""FedAMP and HeurFedAMP: the weights, the pull, what the server keeps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.algorithms.bowls import Bowl, Federation, near
from tests.algorithms.worlds import rounds, world
from tests.helpers import same, tree

from fedloom import recipe as recipes
from fedloom.algorithms import kept
from fedloom.algorithms.fedamp import OWN, FedAmp, HeurFedAmp
from fedloom.types import RecipeError

BOWLS = {"a": Bowl(2.0, 1.0), "b": Bowl(0.5, -4.0), "c": Bowl(1.0, 2.0), "d": Bowl(1.0, 9.0)}


@pytest.mark.parametrize("name", ["fedamp", "heurfedamp"])
def test_without_a_pull_it_is_local(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    cohorts = [(), ("client-1", "client-3"), ()]
    alone = world(tiny_folder, tmp_path / "a", algorithm="local")
    rounds(alone, cohorts)
    them = world(tiny_folder, tmp_path / "b", algorithm={"name": name, "lam": 0})
    state = rounds(them, cohorts)
    for client in them.clients:
        own = dict(them.memories.load(client)[OWN].tensors)
        assert same(own, dict(alone.memories.load(client)["adapter"].tensors))
        assert same(own, dict(kept.kept(state, client)))  # the server's copy is the client's, bit for bit


@pytest.mark.parametrize("heuristic", [False, True])
def test_a_naive_second_implementation(heuristic: bool) -> None:
    lam, sigma, alpha, xi = 0.6, 20.0, 5.0, 0.3
    algorithm = HeurFedAmp(lam=lam, sigma=2, alpha=alpha, self_weight=xi) if heuristic else FedAmp(
        lam=lam, sigma=sigma, alpha=alpha
    )  # fmt: skip
    them = Federation(algorithm, BOWLS)
    w: dict[str, Any] = dict.fromkeys(BOWLS, torch.zeros(2, dtype=torch.float64))
    seen: set[str] = set()
    for cohort in (["a", "b", "c"], ["a", "b", "c"], ["a", "d"], ["a", "b", "c", "d"]):
        u = {}
        for k in cohort:
            if k not in seen:
                u[k] = sum(w[j] for j in seen) / len(seen) if seen else w[k]
                continue
            others = [j for j in seen if j != k]
            if heuristic:
                score = {j: math.exp(2 * float(torch.cosine_similarity(w[k], w[j], 0))) for j in others}
                weight = {j: (1 - xi) * score[j] / sum(score.values()) for j in others}
            else:
                weight = {j: alpha * math.exp(-float((w[k] - w[j]).square().sum()) / sigma) / sigma for j in others}
            u[k] = sum(weight[j] * w[j] for j in others) + (1 - sum(weight.values())) * w[k]
        them.round(cohort)
        for k in cohort:
            bowl = BOWLS[k]
            for _ in range(bowl.steps):
                w[k] = w[k] - bowl.lr * (bowl.slope * (w[k] - bowl.target) + lam / alpha * (w[k] - u[k]))
            torch.testing.assert_close(them.down[k].groups["params"].tensors["w"], u[k], rtol=0, atol=1e-12)
            torch.testing.assert_close(them.own(k)["w"], w[k], rtol=0, atol=1e-12)
        seen |= set(cohort)


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_the_pull_has_a_gradient_and_is_squared(alpha: float | None) -> None:
    """Many steps find the minimum of a/2 (w - c)^2 + lambda / (2 alpha) (w - u)^2, whatever lambda is."""
    bowls = {name: Bowl(b.slope, b.target, steps=400, lr=0.1) for name, b in BOWLS.items()}
    for lam in (1.0, 4.0):
        them = Federation(FedAmp(lam=lam, sigma=50.0, alpha=alpha), bowls)
        them.round()
        them.round()
        for name, bowl in bowls.items():
            message = them.down[name].groups["params"]
            u, pull = float(message.tensors["w"][0]), lam / (alpha or 1.0)
            best = (bowl.slope * bowl.target + pull * u) / (bowl.slope + pull)
            assert near(them.own(name), best, 1e-4)


@pytest.mark.parametrize("algorithm", [FedAmp(lam=0.5, sigma=1e-6), HeurFedAmp(lam=0.5, self_weight=1)])
def test_the_pull_is_the_same_in_a_federation_of_any_size(algorithm: FedAmp) -> None:
    """Where nobody is near, u is the client's own adapter, and a round is the same whoever else takes part."""
    ends = []
    for n in (2, 60):
        them = Federation(algorithm, {"a": Bowl(2.0, 1.0), **{f"b{i}": Bowl(1.0, 9.0 + i) for i in range(n - 1)}})
        for _ in range(3):
            them.round()
        ends.append(them.own("a"))
        assert not them.down["a"].groups["params"].scalars
    assert same(dict(ends[0]), dict(ends[1]))


def test_equal_clients_and_far_ones() -> None:
    alike = Federation(FedAmp(sigma=3.0), dict.fromkeys("abc", Bowl(1.0, 2.0)))
    alike.round()
    for name in "abc":
        u = alike.algorithm.broadcast(alike.server, alike.state, name).groups["params"].tensors
        assert same(dict(u), dict(kept.kept(alike.state, name)))
    far = Federation(FedAmp(sigma=1e-6), BOWLS)
    far.round()
    for name in BOWLS:
        u = far.algorithm.broadcast(far.server, far.state, name).groups["params"].tensors
        assert same(dict(u), dict(kept.kept(far.state, name)))


def test_weights() -> None:
    stream = torch.Generator().manual_seed(0)
    adapters = [{"w": torch.randn(5, generator=stream, dtype=torch.float64)} for _ in range(4)]
    start = {"w": torch.zeros(5, dtype=torch.float64)}
    heuristic = HeurFedAmp(self_weight=0.2)
    for k in range(4):
        weights = heuristic.attention(k, adapters, start, 4)
        assert sum(weight for j, weight in enumerate(weights) if j != k) == pytest.approx(0.8, abs=1e-12)
        assert 0 <= sum(weight for j, weight in enumerate(FedAmp().attention(k, adapters, start, 4)) if j != k) <= 1
    assert heuristic.attention(0, adapters[:1], start, 4) == [0.0]
    assert HeurFedAmp(self_weight=1).attention(0, adapters, start, 4)[1:] == [0.0] * 3


def test_a_client_that_never_trained_uses_the_mean() -> None:
    them = Federation(FedAmp(), BOWLS)
    them.round(["a", "b"])
    mean = (kept.kept(them.state, "a")["w"] + kept.kept(them.state, "b")["w"]) / 2
    for never in (them.own("c"), them.algorithm.export(them.state, {})["personal"]):
        torch.testing.assert_close(never["w"], mean)
    assert them.algorithm.export(them.state) == {}


@pytest.mark.parametrize("name", ["fedamp", "heurfedamp"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"clients": 1, "partition": "iid"}}, r"data.clients=1: .* there are no others"),
        ({"server": {"optimizer": "fedadam"}}, "there is no global adapter"),
        ({"server": {"aggregator": "median"}}, "every client is sent a mixture of its own"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_folder: Path, name: str, changes: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.load(tree(tiny_folder, algorithm=name, **changes))


def test_weights_of_more_than_one_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"algorithm.alpha=0.6: 2 near .* weigh 1.2 together.* at most 0.5"):
        recipes.load(tree(tiny_folder, algorithm={"name": "fedamp", "alpha": 0.6}))
    alone = {"algorithm": {"name": "fedamp", "alpha": 0.6}, "data": {"unseen": 0.34}}
    recipes.load(tree(tiny_folder, **alone))  # of two that train, one other weighs 0.6


@pytest.mark.parametrize("name", ["fedamp", "heurfedamp"])
def test_a_pull_under_which_steps_diverge_is_refused(tiny_folder: Path, name: str) -> None:
    def loaded(lam: float, alpha: float | None, **trainer: Any) -> Any:
        algorithm = {"name": name, "lam": lam, "alpha": alpha, "sigma": 9.0}
        return recipes.load(tree(tiny_folder, algorithm=algorithm, trainer={"lr": 0.1, **trainer}))

    for lam, alpha in ((20.0, None), (2.0, 0.1)):
        with pytest.raises(RecipeError, match=r"trainer.lr x the pull of .* is 2: from 2 on steps go ever further"):
            loaded(lam, alpha, optimizer="sgd")
        loaded(lam, alpha, optimizer="adamw")
    loaded(19.0, None, optimizer="sgd")
