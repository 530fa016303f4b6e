"""Every shipped recipe of a method runs two rounds on the tiny model, and on the bundled one in tests marked `slow`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from tests.helpers import MODEL, lines

import fedloom
from fedloom.algorithms import Algorithm
from fedloom.attacks import Attack
from fedloom.client.adapters import Adapter
from fedloom.recipe import shipped
from fedloom.server.aggregate import Aggregator
from fedloom.server.optim import ServerOptimizer

FAMILIES = (Algorithm, ServerOptimizer, Aggregator, Attack, Adapter)
PLAIN = {"fedavg", "fedprox", "scaffold", "local", "centralized", "sgd", "mean", "lora"}
"""Older than these recipes: `demo` runs them."""
FORMS = {"nesterov", "fedavgm-ema", "lora-sb"}
"""Of others that have a recipe; `diloco` uses the first, `fed-sb` the third."""
SHIPPED = {name for family in FAMILIES for name in family.known if family.known[name].__module__.startswith("fedloom")}


def methods() -> list[str]:
    """Return the shipped recipes that are named like a part of the server's half, an algorithm or an attack."""
    return sorted(set(shipped()) & (SHIPPED - PLAIN))


def _run(name: str, out: Path, *texts: str, **settings: object) -> fedloom.Result:
    result = fedloom.run(name, "rounds=2", "checkpoint.keep=1", *texts, out=out, **settings)
    losses = [line["value"] for line in lines(out / "metrics.jsonl") if line["name"] == "train_loss"]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    assert result.summary["rejected"] == 0
    return result


def _short(tree: dict[str, dict[str, object]]) -> dict[str, object]:
    """Return a trainer of few rows a step, and one step where steps are counted."""
    return {"batch": 2, **({"steps": 1} if tree["trainer"].get("steps") else {})}


@pytest.mark.parametrize("name", methods())
def test_two_rounds_on_the_tiny_model(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    tree = yaml.safe_load(shipped()[name])
    told = tree["adapter"] if isinstance(tree["adapter"], dict) else {}
    ranks = {"ranks": [1, 2]} if told.get("ranks") else {}
    small = {"trainer": _short(tree), "runtime": {"threads": 1}, "evaluate": ["loss"]}
    data = {"max_tokens": 2000, "source": {"rows_per_category": 10}}
    adapter = {**({"r": 2} if "r" in told else {}), **({"target": 1} if "target" in told else {}), **ranks}
    result = _run(name, tmp_path / "r", model={"name": str(tiny_folder), **MODEL}, adapter=adapter, data=data, **small)
    assert all(math.isfinite(found["loss"]["loss"]) for found in result.metrics.values())


@pytest.mark.slow
@pytest.mark.bundled
@pytest.mark.parametrize("name", methods())
def test_two_rounds_on_the_bundled_model(tmp_path: Path, name: str) -> None:
    small = {"trainer": _short(yaml.safe_load(shipped()[name])), "evaluate": ["loss"], "runtime": {"threads": 1}}
    result = _run(name, tmp_path / "r", "data.source.rows_per_category=10", **small)
    assert all(math.isfinite(found["loss"]["loss"]) for found in result.metrics.values())


def test_every_method_has_a_recipe() -> None:
    names = set(Algorithm.known) | set(ServerOptimizer.known) | set(Adapter.known)
    mine = {name for name in names & SHIPPED if name not in PLAIN}
    assert mine - FORMS <= set(shipped())
