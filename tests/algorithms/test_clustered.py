"""FL+HC: one cluster is FedAvg, two kinds of clients part, the absent join the nearest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from tests.algorithms.bowls import Bowl, Federation, near
from tests.algorithms.worlds import rounds, world
from tests.helpers import same, tree

from fedloom import recipe as recipes
from fedloom.algorithms.clustered import CENTRE, MEMBERS, MODEL, Clustered
from fedloom.algorithms.fedavg import FedAvg
from fedloom.types import RecipeError

KINDS = {"a": Bowl(1.0, 3.0, rows=2), "b": Bowl(1.0, -3.0), "c": Bowl(1.0, 4.0), "d": Bowl(1.0, -5.0, rows=3)}
"""`a` and `c` go up, the others down."""


WAYS: list[dict[str, Any]] = [
    {"distance": 0.5},
    {"clusters": 2},
    {"metric": "euclidean", "distance": 1.9},
    {"metric": "manhattan", "distance": 2.5},
]


def test_one_cluster_is_fedavg(tiny_folder: Path, tmp_path: Path) -> None:
    cohorts = [(), ("client-1", "client-2"), ("client-2", "client-3"), ()]
    plain = rounds(world(tiny_folder, tmp_path / "a", rounds=4), cohorts)
    one = world(tiny_folder, tmp_path / "b", rounds=4, algorithm={"name": "clustered", "warmup": 1, "clusters": 1})
    state = rounds(one, cohorts)
    assert same(dict(one.recipe.algorithm.export(state)["shared"]), dict(plain.params))
    for client in one.clients:
        own = one.engine.at_client(state, client, one.recipe.algorithm.own)
        assert same(dict(own), dict(plain.params))


@pytest.mark.parametrize(
    "how",
    [
        *({"linkage": linkage, **how} for linkage in ("average", "complete", "single") for how in WAYS),
        {"linkage": "ward", "metric": "euclidean", "distance": 1.9},
        {"linkage": "ward", "metric": "euclidean", "clusters": 2},
    ],
)
def test_clients_of_a_kind_come_together(how: Any) -> None:
    them = Federation(Clustered(warmup=1, **how), KINDS)
    plain = Federation(FedAvg(), KINDS)
    them.round()
    plain.round()
    assert same(dict(them.state.params), dict(plain.state.params))
    them.round()
    assert dict(them.state.slots[MEMBERS].texts) == {"a": "0", "b": "1", "c": "0", "d": "1"}
    pairs = {
        "ac": Federation(FedAvg(), {n: KINDS[n] for n in "ac"}),
        "bd": Federation(FedAvg(), {n: KINDS[n] for n in "bd"}),
    }
    for pair in pairs.values():  # each kind goes on as a federation by itself
        pair.state = plain.state
        pair.round()
    for _ in range(2):
        for names, pair in pairs.items():
            for name in names:
                torch.testing.assert_close(them.own(name)["w"], pair.state.params["w"], rtol=0, atol=1e-14)
            pair.round()
        them.round()
    assert them.algorithm.export(them.state) == {}
    for name in "abcd":
        assert them.algorithm.export(them.state, them.memories[name])["personal"] is them.own(name)


def test_the_absent_join_the_nearest_and_change_nothing_else() -> None:
    them = Federation(Clustered(warmup=0), KINDS)
    them.round(["a", "b"])
    models = {c: them.state.slots[f"{MODEL}{c}"].tensors for c in "01"}
    assert near(them.own("c"), 0.0)  # what was clustered
    them.round(["c"])
    assert dict(them.state.slots[MEMBERS].texts) == {"a": "0", "b": "1", "c": "0"}
    assert all(same(dict(them.state.slots[f"{MODEL}{c}"].tensors), dict(models[c])) for c in "01")
    assert them.own("c") is them.state.slots[f"{MODEL}0"].tensors
    them.round(["b", "d"])
    assert them.state.slots[MEMBERS].texts["d"] == "1"
    centre = them.state.slots[f"{CENTRE}1"].tensors
    assert same(dict(centre), dict(models["1"]))  # its first mean change, from zero
    assert not same(dict(them.state.slots[f"{MODEL}1"].tensors), dict(models["1"]))


def test_a_stranger_uses_the_cluster_that_serves_its_rows_best() -> None:
    them = Federation(Clustered(warmup=0), KINDS)
    them.round()
    them.server = type(them.server)(
        ("a", "b", "c"), *(getattr(them.server, f) for f in ("aggregator", "optimizer", "lr", "draw", "stream", "lora"))
    )
    assert them.own("d") is not them.state.params
    assert same(dict(them.own("d")), dict(them.state.slots[f"{MODEL}1"].tensors))


@pytest.mark.parametrize("metric", ["euclidean", "manhattan"])
def test_distances_are_over_all_tensors(metric: Any) -> None:
    """Clusters are those of scipy's own linkage of the changes as one vector each."""
    stream = torch.Generator().manual_seed(5)
    shapes = {"a": (3, 2), "b": (4,)}
    changes = [{k: torch.randn(s, generator=stream, dtype=torch.float64) for k, s in shapes.items()} for _ in range(9)]
    flat = torch.stack([torch.cat([t.flatten() for t in one.values()]) for one in changes]).numpy()
    for linked in ("average", "complete", "single", *(["ward"] if metric == "euclidean" else [])):
        labels = fcluster(
            linkage(flat, linked, "cityblock" if metric == "manhattan" else metric), 4, "maxclust"
        ).tolist()
        found = Clustered(metric=metric, linkage=linked, clusters=4).grouped(changes)
        assert [[a == b for b in found] for a in found] == [[a == b for b in labels] for a in labels]


def test_a_cohort_of_one_is_one_cluster() -> None:
    them = Federation(Clustered(warmup=0), KINDS)
    them.round(["b"])
    assert dict(them.state.slots[MEMBERS].texts) == {"b": "0"}
    them.round(["a", "b"])
    assert dict(them.state.slots[MEMBERS].texts) == {"a": "0", "b": "0"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"clients": 1, "partition": "iid"}}, "data.clients=1: .* there are no others"),
        ({"server": {"optimizer": "fedadam"}}, "every cluster has a model of its own"),
        ({"server": {"aggregator": "median"}}, "updates meet within their cluster"),
        ({"rounds": 2}, "algorithm.warmup=2: rounds=2 leaves none"),
        ({"sampler": {"count": 1}}, "sampler=uniform takes one client of 3 in the round after algorithm.warmup=2"),
        ({"sampler": {"fraction": 0.5}, "data": {"unseen": 0.34}}, "takes one client of 2 in the round after"),
        (
            {"algorithm": {"name": "clustered", "linkage": "ward"}},
            "metric=cosine: linkage=ward .* set metric=euclidean",
        ),
        (
            {"algorithm": {"name": "clustered", "linkage": "ward", "metric": "manhattan"}},
            "metric=manhattan: linkage=ward is of squared Euclidean distances",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tiny_folder: Path, changes: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.load(tree(tiny_folder, **{"rounds": 3, "algorithm": "clustered", **changes}))


def test_one_cluster_that_was_asked_for_may_be_of_one_client(tiny_folder: Path) -> None:
    recipes.load(tree(tiny_folder, rounds=3, algorithm={"name": "clustered", "clusters": 1}, sampler={"count": 1}))
