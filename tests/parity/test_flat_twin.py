"""The flat example and the library's reference path are the same computation, bit for bit; the fast path is near."""

from __future__ import annotations

from pathlib import Path

import torch
from examples.fedavg_flat import fedavg
from tests.helpers import adapter, run, tree

from fedloom import recipe as recipes
from fedloom.tracking import Sink
from fedloom.world import World, prepare


def test_flat_twin_equals_the_reference_path(tiny_folder: Path, tmp_path: Path) -> None:
    changes = {"rounds": 3, "evaluate": [], "runtime": {"reference": True}}
    reference = adapter(run(tiny_folder, tmp_path / "a", **changes))
    fast = adapter(run(tiny_folder, tmp_path / "b", rounds=3, evaluate=[]))

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
        torch.testing.assert_close(fast[saved], reference[saved], rtol=2e-3, atol=2e-4)


def test_the_example_is_short() -> None:
    assert len(Path("examples/fedavg_flat.py").read_text().splitlines()) <= 150
