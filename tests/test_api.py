"""The public names, and the promises of recipes and parts."""

from __future__ import annotations

from pathlib import Path

import pytest

import fedloom
from fedloom import recipe as recipes
from fedloom.algorithms.fedavg import FedAvg
from fedloom.recipe import Recipe
from fedloom.types import RecipeError


def test_public_names() -> None:
    assert set(fedloom.__all__) == {
        "Algorithm", "Bundle", "Client", "ClientUpdate", "DataError", "Evaluation", "Evaluator", "FedloomError",
        "Memory", "Message", "ModelError", "Part", "Recipe", "RecipeError", "Result", "Sample", "Server",
        "ServerState", "SiteError", "Steps", "Stopped", "Tensors", "WireError", "__version__", "resume", "run",
    }  # fmt: skip
    for name in fedloom.__all__:
        assert getattr(fedloom, name) is not None
    assert callable(fedloom.run)
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        _ = fedloom.runn


@pytest.mark.parametrize("name", [n for n in recipes.shipped() if not n.endswith("_tiny")])
def test_shipped_recipes_are_valid_and_round_trip(name: str) -> None:
    for files in ([], [f"{name}_tiny"]) if f"{name}_tiny" in recipes.shipped() else ([],):
        recipe = recipes.load(name, set_files=files)
        assert recipes.validate(recipe.dump(), name) == recipe
        import yaml

        assert recipes.validate(yaml.safe_load(recipe.to_yaml()), name) == recipe


def test_fs_llms_published_values() -> None:
    table = {
        "fed-gsm8k-3": (3, 1000, 5e-3, 16, 0.05, 0.998),
        "fed-dolly-meta": (8, 650, 5e-3, 64, 0.1, 0.99),
        "fed-dolly-lda": (3, 650, 3e-4, 16, 0.05, 0.998),
        "fed-codealpaca-meta": (9, 650, 1e-4, 32, 0.0, 0.89),
    }
    for name, values in table.items():
        recipe = recipes.load(name)
        data, trainer, adapter = recipe.data, recipe.trainer, recipe.adapter
        found = (data.clients, data.max_tokens, trainer.lr, adapter.alpha, adapter.dropout, data.splits.train)
        assert found == values, name
        assert (recipe.rounds, trainer.steps, trainer.batch, adapter.r) == (500, 30, 1, 8)
        assert trainer.optimizer.part_name == "sgd"


def test_overrides() -> None:
    texts = ["algorithm=fedprox", "algorithm.mu=1e-2", "data.clients=7", "evaluate.1.every=3", "sampler.count=2"]
    recipe = recipes.load("demo", texts)
    assert recipe.algorithm.dump() == {"name": "fedprox", "weighting": "examples", "mu": 0.01}
    assert recipe.data.clients == 7
    assert recipe.evaluate[1].every == 3
    assert recipe.sampler.dump() == {"name": "uniform", "fraction": None, "count": 2}
    assert recipes.load("demo", ["evaluate=[]"]).evaluate == ()
    with pytest.raises(RecipeError, match=r"evaluate\.9.*2 entries"):
        recipes.load("demo", ["evaluate.9.every=3"])
    with pytest.raises(RecipeError, match="no such name"):
        recipes.load("demo", set_files=["demo_tny"])


def test_all_problems_of_a_recipe_are_told_together() -> None:
    with pytest.raises(RecipeError, match="3 problems") as caught:
        recipes.load("demo", ["trainer.lr=0", "algorithm.mu=1", "nonsense=1"])
    assert str(caught.value).count("\n") == 3


def test_yaml_errors_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("rounds: 3\ndata: {clients: 2\nseed: 1\n")
    with pytest.raises(RecipeError, match=r"broken\.yaml: line \d"):
        recipes.load(path)
    path.write_text("- just\n- a list\n")
    with pytest.raises(RecipeError, match="expected a mapping"):
        recipes.load(path)


def test_parts_are_registered_once() -> None:
    with pytest.raises(TypeError, match="registered twice"):

        class Again(FedAvg, name="fedavg"):
            pass


def test_recipes_are_frozen() -> None:
    recipe = Recipe()
    with pytest.raises(ValueError, match="frozen"):
        recipe.rounds = 3  # type: ignore[misc]
    assert recipes.validate({"trackers": ["console"]}, "r") == recipe
