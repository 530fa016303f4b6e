"""Recipes: read, overridden, refused with all problems together, written back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedloom import recipe as recipes
from fedloom.algorithms.fedprox import FedProx
from fedloom.types import RecipeError

MODEL = {"model": {"name": "somewhere/tiny"}}


def test_overrides_reach_everywhere() -> None:
    tree = {**MODEL, "algorithm": "fedprox", "evaluate": ["loss"]}
    recipe = recipes.load(
        tree, ["algorithm.mu=0.5", "trainer.lr=1e-2", "evaluate.0.every=3", "sampler.count=2"], settings={"rounds": 4}
    )
    assert recipe.algorithm == FedProx(mu=0.5)
    assert (recipe.trainer.lr, recipe.evaluate[0].every, recipe.rounds) == (1e-2, 3, 4)
    assert tree["algorithm"] == "fedprox"


def test_overrides_leave_the_mapping_as_it_is() -> None:
    tree = {**MODEL, "data": {"clients": 2}, "evaluate": [{"name": "loss", "every": 1}]}
    assert recipes.load(tree, ["data.clients=3", "evaluate.0.every=2"]).data.clients == 3
    assert tree == {**MODEL, "data": {"clients": 2}, "evaluate": [{"name": "loss", "every": 1}]}


def test_round_trip_through_yaml() -> None:
    recipe = recipes.load({**MODEL, "transforms": [{"name": "clip", "norm": 2.0}], "compare": ["local"]})
    again = recipes.validate(yaml.safe_load(recipe.to_yaml()), "again")
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()


def test_all_problems_stand_together() -> None:
    tree = {"model": "x/y", "algorithm": "fedavgg", "trainer": {"lr": -1, "stps": 3}, "rounds": 0}
    with pytest.raises(RecipeError) as caught:
        recipes.load(tree)
    text = str(caught.value)
    assert "4 problems" in text
    for part in (
        r"algorithm: there is no algorithm named 'fedavgg'; did you mean 'fedavg'?",
        "trainer.lr: should be greater than 0 (got -1)",
        "there is no key 'stps' here; did you mean 'steps'?",
        "rounds: should be greater than 0 (got 0)",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "scaffold"}, "trainer.optimizer=sgd"),
        ({"algorithm": "scaffold", "trainer": {"optimizer": "sgd"}}, "clip_norm=null"),
        ({"sampler": {"fraction": 0.5, "count": 2}}, "either fraction or count"),
        ({"trainer": {"steps": 2, "epochs": 1}}, "exactly one of steps, epochs, tokens"),
        ({"evaluate": ["loss", "loss"]}, "'loss' is there twice"),
        ({"early_stop": {"evaluator": "los"}}, "did you mean 'loss'"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.load({**MODEL, **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rounds", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("rounds=[1", "not YAML"),
        ("rounds.x=1", "has no keys of its own"),
        ("evaluate.7=loss", "the list has 1 entries"),
    ],
)
def test_odd_overrides(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.load({**MODEL, "rounds": 3, "evaluate": ["loss"]}, [text])


def test_files(tmp_path: Path) -> None:
    path, more = tmp_path / "mine.yaml", tmp_path / "more.yaml"
    path.write_text("model: x/y\ntrainer: {lr: 0.1}\n")
    more.write_text("trainer: {steps: 3}\n")
    assert recipes.load(path, set_files=[str(more)]).trainer.steps == 3
    assert recipes.load(path, set_files=[str(more)]).trainer.lr == 0.1
    path.write_text("model: [\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml: line \d+: not YAML"):
        recipes.load(path)
    path.write_text("- a\n")
    with pytest.raises(RecipeError, match="expected a mapping"):
        recipes.load(path)
    with pytest.raises(RecipeError, match=r"no such name or file.*fedloom list recipes"):
        recipes.load("demmo")
    with pytest.raises(RecipeError, match="no such file"):
        recipes.load(tmp_path / "none.yaml")


def test_overlay_replaces_another_part_and_fills_the_same() -> None:
    tree = {"algorithm": {"name": "fedprox", "mu": 1.0}}
    assert recipes.overlay(tree, {"algorithm": {"mu": 2.0}}) == {"algorithm": {"name": "fedprox", "mu": 2.0}}
    assert recipes.overlay(tree, {"algorithm": {"name": "fedavg"}}) == {"algorithm": {"name": "fedavg"}}
    assert recipes.overlay({"algorithm": "fedprox"}, {"algorithm": {"mu": 2.0}})["algorithm"]["name"] == "fedprox"
    assert tree == {"algorithm": {"name": "fedprox", "mu": 1.0}}


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3),
        lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    )
)
def test_overlay_of_itself_changes_nothing(tree: Any) -> None:
    if isinstance(tree, dict):
        assert recipes.overlay(tree, tree) == tree
        assert recipes.overlay(tree, {}) == tree
