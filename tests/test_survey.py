"""The survey of algorithms says what their messages and memories really hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.helpers import run, tree
from typer.testing import CliRunner

from fedloom import recipe as recipes
from fedloom.algorithms import Algorithm
from fedloom.cli.main import app
from fedloom.survey import paper_of, partners, shapes_of, survey, toy_shapes
from fedloom.tensors import nbytes
from fedloom.wire import codec

CLIENTS = ["client-1", "client-2", "client-3"]


def test_bytes_are_those_of_a_run(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensor bytes that the survey tells are those of the messages of a real run, round by round."""
    from fedloom.runtime import engine

    sizes: list[int] = []
    real = engine.codec.encode

    def counted(groups: dict[str, object]) -> bytes:
        data: bytes = real(groups)
        sizes.append(sum(nbytes(bundle.tensors) for bundle in codec.decode(data).values()))
        return data

    monkeypatch.setattr(engine.codec, "encode", counted)
    recipe = recipes.load(tree(tiny_folder, algorithm="fedex", rounds=3, evaluate=[], runtime={"cohort": 1}))
    run(tiny_folder, tmp_path / "a", algorithm="fedex", rounds=3, evaluate=[], runtime={"cohort": 1})
    found = survey(recipe.algorithm, recipe, CLIENTS, shapes_of(recipe, CLIENTS))
    assert sizes.count(round(found.down)) >= 2 * len(CLIENTS)  # broadcasts of the rounds after the first
    assert sizes.count(round(found.up)) >= 3 * len(CLIENTS)
    assert sizes.count(round(found.first)) >= len(CLIENTS)
    assert round(found.down) == 3 * round(found.up)  # the factors, and the residual of rank (3 - 1) r


def test_every_algorithm_is_surveyed_without_a_model() -> None:
    base = recipes.Recipe()
    for name, kind in Algorithm.known.items():
        assert issubclass(kind, Algorithm)
        found = survey(kind(), base, CLIENTS, toy_shapes())
        assert found.summary, name
        assert paper_of(kind) or name in ("local", "centralized") or not kind.__module__.startswith("fedloom."), name


def test_private_groups_are_in_no_message() -> None:
    """What an algorithm calls its own stays with the client."""
    base = recipes.Recipe()
    found = survey(Algorithm.known["fedsa-lora"](), base, CLIENTS, toy_shapes())
    assert found.shares == {"params": {"A"}}
    assert set().union(*found.keeps.values()) == {"B"}
    assert "mixed ranks" in partners(Algorithm.known["hetlora"])
    assert "sums alone" not in partners(Algorithm.known["hetlora"])
    assert partners(Algorithm.known["fedex"]) == []


def test_the_table(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps(tree(tiny_folder)))
    told = CliRunner().invoke(app, ["list", "algorithms", "--recipe", str(recipe)], env={"COLUMNS": "200"}).stdout
    lines = {line.split()[0]: line for line in told.splitlines() if line.strip()}
    assert "2410.09432" in lines["fedex"]
    assert "kB" in lines["fedavg"]
    assert "scaffold does not fit this recipe: algorithm.variant=sgd_exact holds for plain SGD only" in told
    plain = CliRunner().invoke(app, ["list", "algorithms"], env={"COLUMNS": "200"}).stdout
    assert "fedavg" in plain
    assert "down" not in plain.splitlines()[0]
    refused = CliRunner().invoke(app, ["list", "algorithm", "--recipe", str(recipe)])
    assert "--recipe goes with `fedloom list algorithms`" in str(refused.exception)
