"""MIRA: local training without coupling, the mean with all of it, what mixing keeps, given and found relations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.algorithms.bowls import Bowl, Federation, near
from tests.algorithms.worlds import rounds, world
from tests.helpers import run, same, tree

from fedloom import recipe as recipes
from fedloom.algorithms import kept
from fedloom.algorithms.mira import Mira
from fedloom.types import RecipeError

BOWLS = {"a": Bowl(2.0, 1.0), "b": Bowl(0.5, -4.0), "c": Bowl(1.0, 2.0)}
GIVEN = ((0.0, 0.2, 0.0), (0.2, 0.0, 0.5), (0.0, 0.5, 0.0))


def locally(them: Federation, names: str) -> dict[str, torch.Tensor]:
    """Return what local steps make of the clients' adapters."""
    found = {}
    for name in names:
        w, bowl = kept.kept(them.state, name)["w"], BOWLS[name]
        for _ in range(bowl.steps):
            w = w - bowl.lr * bowl.slope * (w - bowl.target)
        found[name] = w
    return found


def test_without_coupling_it_is_local(tiny_folder: Path, tmp_path: Path) -> None:
    cohorts = [(), ("client-1", "client-3"), ()]
    alone = world(tiny_folder, tmp_path / "a", algorithm="local")
    rounds(alone, cohorts)
    them = world(tiny_folder, tmp_path / "b", algorithm={"name": "mira", "coupling": 0})
    state = rounds(them, cohorts)
    for client in them.clients:
        local = dict(alone.memories.load(client)["adapter"].tensors)
        assert same(dict(them.engine.at_client(state, client, them.recipe.algorithm.own)), local)
        assert same(dict(them.recipe.algorithm.export(state, them.memories.load(client))["personal"]), local)


def test_complete_and_fully_coupled_everyone_has_the_mean() -> None:
    them = Federation(Mira(coupling=1, relation="complete"), BOWLS)
    for _ in range(2):
        mean = sum(locally(them, "abc").values()) / 3
        them.round()
        for name in BOWLS:
            assert near(them.own(name), float(mean[0]), 1e-12)


@pytest.mark.parametrize("relation", ["cosine", "complete", GIVEN])
def test_mixing_keeps_the_sum_and_is_the_formula(relation: Any) -> None:
    them = Federation(Mira(coupling=0.7, relation=relation), BOWLS)
    for cohort in ("abc", "ab", "c"):
        before = {name: kept.kept(them.state, name)["w"] for name in "abc"}
        w = {**before, **locally(them, cohort)}
        them.round(list(cohort))
        after = {name: kept.kept(them.state, name)["w"] for name in "abc"}
        torch.testing.assert_close(sum(after.values()), sum(w.values()), rtol=0, atol=1e-12)
        for i, k in enumerate("abc"):
            expected = w[k]
            for j, other in enumerate("abc"):
                if other != k:
                    cosine = torch.cosine_similarity(w[k], w[other], 0)
                    a = {"cosine": max(0.0, float(cosine)) / 3, "complete": 1 / 3}.get(str(relation))
                    expected = expected - 0.7 * (GIVEN[i][j] if a is None else a) * (w[k] - w[other])
            torch.testing.assert_close(after[k], expected, rtol=0, atol=1e-12)


def test_who_has_not_trained_yet() -> None:
    them = Federation(Mira(coupling=0.5, relation="complete"), BOWLS)
    them.round(["a", "b"])
    assert "client:c" not in them.state.slots  # it draws nobody back to the beginning
    assert near(them.own("c"), 0.0)
    stranger = them.algorithm.broadcast(them.server, them.state, "nobody").groups["params"].tensors
    mean = (kept.kept(them.state, "a")["w"] + kept.kept(them.state, "b")["w"]) / 2
    torch.testing.assert_close(stranger["w"], mean)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coupling": 1.1}, r"coupling=1.1: .* swing ever further apart; lower"),
        ({"coupling": 1.5, "relation": GIVEN}, r"degrees of algorithm.relation up to 0.7 .* less than 1.42"),
        ({"relation": GIVEN[:2]}, "2 rows must have 2 numbers each"),
        ({"relation": ((0, 1), (0.5, 0))}, "row 2 has 0.5 at place 1, row 1 has 1 at place 2; it must be symmetric"),
        ({"coupling": 0.1, "relation": ((0, 1), (1, 0))}, "has 2 rows, and there are 3 clients"),
        ({"relation": "ring"}, "'cosine' or 'complete'"),
        ({"coupling": -0.1}, "greater than or equal to 0"),
    ],
)
def test_relations_and_couplings_that_do_not_work(tiny_folder: Path, changes: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.load(tree(tiny_folder, algorithm={"name": "mira", **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"clients": 1, "partition": "iid"}}, "data.clients=1: .* there are no others"),
        ({"server": {"optimizer": "fedadam"}}, "there is no global adapter"),
        ({"server": {"aggregator": "median"}}, "every client mixes with related ones"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_folder: Path, changes: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.load(tree(tiny_folder, algorithm="mira", **changes))


def test_a_relation_of_other_clients_is_refused_where_they_are_known(tiny_folder: Path, tmp_path: Path) -> None:
    mira = {"name": "mira", "relation": ((0, 0.1), (0.1, 0))}
    problem = "algorithm.relation has 2 rows, and there are 3 clients that train"
    with pytest.raises(RecipeError, match=f"data.clients=4, data.unseen=0.25: {problem}"):
        recipes.load(tree(tiny_folder, algorithm=mira, data={"clients": 4, "unseen": 0.25}))
    recipes.load(tree(tiny_folder, algorithm=mira, data={"unseen": 0.34}))
    owners = {"partition": {"name": "natural", "key": "category"}}
    recipes.load(tree(tiny_folder, algorithm=mira, data=owners))
    with pytest.raises(RecipeError, match=f"data.partition=natural: clients that train: 3: {problem}"):
        run(tiny_folder, tmp_path / "a", algorithm=mira, data=owners)
    assert not (tmp_path / "a" / "checkpoints").exists()  # before anything is trained
