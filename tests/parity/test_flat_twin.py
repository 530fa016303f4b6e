"""The flat example and the library's reference path are the same computation, bit for bit; the fast path is near."""

from __future__ import annotations

from pathlib import Path

import torch
from examples.fedavg_flat import fedavg
from tests.helpers import adapter, run, tree

import fedloom
from fedloom import recipe as recipes
from fedloom.assets import prepare
from fedloom.tracking import Sink
from fedloom.world import World


def test_flat_twin_equals_the_reference_path(tiny_folder: Path, tmp_path: Path) -> None:
    changes = {"rounds": 3, "evaluate": [], "runtime": {"reference": True}}
    reference = adapter(run(tiny_folder, tmp_path / "a", **changes))

    recipe = recipes.load(tree(tiny_folder, **changes)).resolved()
    world = World(recipe, tmp_path, prepare(recipe, Sink()), Sink())
    clients = {}
    for name in world.clients:
        rows = world.rows(name)
        clients[name] = [(rows[i].ids, rows[i].train) for i in range(len(rows))]
    twin = fedavg(tiny_folder, clients, rounds=3)

    assert len(twin) == len(reference)
    for name, value in twin.items():
        saved = name.replace(".default", "")
        assert torch.equal(value, reference[saved]), saved


def test_the_fast_path_is_the_reference_path_up_to_rounding(tiny_folder: Path, tmp_path: Path) -> None:
    """Packed, a shared beginning, clients in one pass, fused: in float64, where AdamW cannot blow a rounding up."""
    changes = {"rounds": 3, "evaluate": [], "model": {"dtype": "fp64"}}
    fast = run(tiny_folder, tmp_path / "fast", **changes)
    assert fedloom.recipe.load(fast.folder / "recipe.yaml").runtime.cohort == 3
    reference = adapter(run(tiny_folder, tmp_path / "reference", runtime={"reference": True}, **changes))
    for name, value in adapter(fast).items():
        torch.testing.assert_close(value, reference[name], rtol=0, atol=2e-5)


def test_the_example_is_short() -> None:
    assert len(Path("examples/fedavg_flat.py").read_text().splitlines()) <= 150
