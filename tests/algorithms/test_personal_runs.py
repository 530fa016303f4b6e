"""Whole runs of personal methods: resumed as straight, private values not in a message, used as saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.helpers import run
from tests.messages import watched

import fedloom
from fedloom.checkpoint import Checkpoints, MemoryStore

METHODS: dict[str, dict[str, Any]] = {
    "ditto": {"lam": 1.0},
    "pfedme": {"lam": 1.0, "outer_lr": 0.5, "inner_steps": 2},
    "fedper": {},
    "fedrep": {},
    "admm": {"rho": 0.5, "weighting": "examples"},
    "fedamp": {},
    "heurfedamp": {},
    "mira": {},
    "clustered": {"warmup": 1, "distance": 0.2},
    "fedem": {"components": 2},
}
AT_THE_SERVER = {"fedamp", "heurfedamp", "mira", "clustered"}
"""Methods whose server has every client's adapter, and sends it mixtures."""
SMALL: dict[str, Any] = {
    "data": {"clients": 4, "partition": "iid", "unseen": 0.25},
    "sampler": {"count": 2},
    "runtime": {"cohort": 1},
    "adapt_steps": 1,
    "evaluate": [{"name": "loss", "every": 0}],
}


@pytest.mark.parametrize("name", METHODS)
def test_a_run(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    changes = {**SMALL, "algorithm": {"name": name, **METHODS[name]}}
    with watched() as seen:
        whole = run(tiny_folder, tmp_path / "a", **changes, rounds=3)
    assert whole.summary["rejected"] == 0
    assert set(whole.metrics) == {"base", "federated", "federated adapted", "unseen", "unseen adapted"}
    run(tiny_folder, tmp_path / "b", **changes, rounds=2)
    longer = fedloom.resume(tmp_path / "b", ["rounds=3"])
    for key in ("adapter_sha256", "metrics", "trained_tokens", "bytes_up", "bytes_down"):
        assert longer.summary[key] == whole.summary[key], key
    store = MemoryStore(whole.folder / "memories")
    store.look_at(3)
    engine, algorithm = seen[0].engine, whole.recipe.algorithm
    state, _ = Checkpoints(whole.folder / "checkpoints", 9).load(3)
    sent = [t for p in seen for m in (p.down, p.up) for bundle in m.groups.values() for t in bundle.tensors.values()]
    trained = {passed.client for passed in seen}
    assert len(trained) == 3
    for client in engine.stage.server.clients:
        memory = store.load(client)
        kept = [t for bundle in memory.values() for t in bundle.tensors.values()]
        assert (len(kept) > 0) == (name not in {"mira", "clustered"})
        if name not in AT_THE_SERVER:
            moved = [t for t in kept if float(t.abs().max()) > 0]
            assert not any(t.shape == other.shape and torch.equal(t, other) for t in moved for other in sent)
        own = dict(engine.at_client(state, client, algorithm.own))
        saved = load_file(whole.folder / "adapters" / client / "personal" / "adapter_model.safetensors")
        assert {f"base_model.model.{key}.weight" for key in own} == set(saved)
        assert all(torch.equal(saved[f"base_model.model.{key}.weight"], t) for key, t in own.items())


@pytest.mark.parametrize("name", ["ditto", "pfedme", "mira", "fedamp", "admm", "clustered"])
def test_other_adapters(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    """Nothing here knows names of LoRA."""
    changes = {"algorithm": {"name": name, **METHODS[name]}, "rounds": 2, "evaluate": []}
    changes["adapter"] = {"name": "ia3"}
    assert run(tiny_folder, tmp_path / "a", **changes).summary["rejected"] == 0
