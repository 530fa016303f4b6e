"""Whole runs of personal methods: resumed as straight, private values not in a message, used as saved."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import run, same
from tests.messages import watched

import fedloom
from fedloom import slots
from fedloom.checkpoint import FINISHED, Checkpoints, MemoryStore
from fedloom.reopen import read_adapter

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
    "fedalt": {},
    "feddpa-t": {"instances": 2},
    "feddpa-f": {"instances": 2},
    "pf2lora": {"rank": 1},
    "fedpit": {"synthetic": 2, "attempts": 1, "max_new_tokens": 4},
}
AT_THE_SERVER = {"fedamp": "personal", "heurfedamp": "personal", "fedalt": "individual"}
"""Methods whose server has every client's adapter, and the group of a client's memory that holds it."""
FROM_THE_SHARED = {"feddpa-t"}
"""Methods that begin what is private with what a client sends in its first round."""
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
    # what clients spend after a round that turns out not to be the last one is spent
    costs = () if whole.recipe.algorithm.finishes else ("trained_tokens", "bytes_down")
    for key in ("adapter_sha256", "metrics", "bytes_up", *costs):
        assert longer.summary[key] == whole.summary[key], key
    store = MemoryStore(whole.folder / "memories")
    store.look_at(3 + FINISHED if whole.recipe.algorithm.finishes else 3)
    engine, algorithm = seen[0].engine, whole.recipe.algorithm
    state, _ = Checkpoints(whole.folder / "checkpoints", 9).load(3)
    scale = engine.stage.server.ranks.scale
    told = {name: algorithm.broadcast(engine.stage.server, state, name) for name in engine.stage.server.clients}
    sent_texts = {text for p in seen for m in (p.down, p.up) for b in m.groups.values() for text in b.texts.values()}
    sent = [t for p in seen for m in (p.down, p.up) for bundle in m.groups.values() for t in bundle.tensors.values()]
    trained = Counter(passed.client for passed in seen)
    assert len(trained) == 3
    for client in engine.stage.server.clients:
        memory = store.load(client)
        private = [bundle for group, bundle in memory.items() if group != AT_THE_SERVER.get(name)]
        kept = [t for bundle in private for t in bundle.tensors.values()]
        assert (len(kept) > 0) == (name not in {"fedamp", "heurfedamp", "mira", "clustered"})
        if trained[client] > 1 or name not in FROM_THE_SHARED:
            moved = [t for t in kept if float(t.abs().max()) > 0]
            assert not any(t.shape == other.shape and torch.equal(t, other) for t in moved for other in sent)
        assert not sent_texts & {text for bundle in private for text in bundle.texts.values()}
        own = engine.drive(algorithm.own(replace(engine.client(client, 3), memory=memory), told[client]), client, 3)
        saved = read_adapter(whole.folder, whole.recipe, None, client)[0]
        assert same(dict(saved), dict(own if any(map(slots.is_router, own)) else slots.collapsed(own, scale)))


@pytest.mark.parametrize("name", ["ditto", "pfedme", "mira", "fedamp", "admm", "clustered"])
def test_other_adapters(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    """Nothing here knows names of LoRA."""
    changes = {"algorithm": {"name": name, **METHODS[name]}, "rounds": 2, "evaluate": []}
    changes["adapter"] = {"name": "ia3"}
    assert run(tiny_folder, tmp_path / "a", **changes).summary["rejected"] == 0
