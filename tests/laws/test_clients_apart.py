"""Clients share one resident model and nothing else: what is private stays private, and order does not matter."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.bare import bare_around
from tests.helpers import adapter, run, tree
from torch.nn import functional
from transformers import AutoModelForCausalLM

import fedloom
from fedloom import recipe as recipes
from fedloom.assets import Assets, prepare
from fedloom.evaluate.base import Evaluation
from fedloom.evaluate.loss import Loss
from fedloom.runtime import engine
from fedloom.runtime.engine import Errand, Reply
from fedloom.server.aggregate import Mean
from fedloom.tracking import Sink
from fedloom.types import Bundle, ClientUpdate, Memory, Message
from fedloom.world import World

SGD = {"optimizer": "sgd", "clip_norm": None}


def _round(assets: Assets, recipe: Any, folder: Path, cohort: list[str]) -> dict[str, Reply]:
    """Train a cohort one after another in the given order, from round 0, and return what each client gives back."""
    folder.mkdir()
    world = World(recipe, folder, assets, Sink())
    state = recipe.algorithm.init(assets.initial)
    errands = [
        Errand(n, engine._sealed(recipe.algorithm.broadcast(world.engine.stage.server, state, n)), {}) for n in cohort
    ]
    return {errand.client: world.engine.train(0, [errand])[0] for errand in errands}


@pytest.mark.parametrize(("algorithm", "trainer"), [("fedavg", {}), ("scaffold", SGD), ("local", {}), ("fedprox", {})])
def test_a_client_does_not_see_who_trained_before_it(
    tiny_folder: Path, tmp_path: Path, algorithm: str, trainer: dict[str, Any]
) -> None:
    recipe = recipes.load(tree(tiny_folder, algorithm=algorithm, trainer=trainer, adapter={"dropout": 0.2})).resolved()
    assets = prepare(recipe, Sink())
    there = _round(assets, recipe, tmp_path / "a", ["client-1", "client-2", "client-3"])
    back = _round(assets, recipe, tmp_path / "b", ["client-3", "client-1", "client-2"])
    for name, reply in there.items():
        assert _timeless(reply.metrics) == _timeless(back[name].metrics)
        assert reply.message == back[name].message
        assert _bits(reply.memory or {}) == _bits(back[name].memory or {})


def _timeless(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.endswith("_seconds")}


def _bits(groups: Memory) -> dict[str, bytes]:
    return {f"{g}/{n}": t.numpy().tobytes() for g, b in groups.items() for n, t in b.tensors.items()}


def test_the_mean_does_not_depend_on_the_order_of_updates() -> None:
    stream = torch.Generator().manual_seed(0)
    updates = [
        ClientUpdate(name, weight, Message({"params": Bundle({"w": torch.randn(50, generator=stream).double()})}))
        for name, weight in (("a", 1.0), ("b", 10.0), ("c", 3.0), ("d", 7.0))
    ]
    means = [Mean().combine(order, bare_around()).groups["params"].tensors["w"] for order in permutations(updates)]
    expected = sum(u.weight * u.message.groups["params"].tensors["w"] for u in updates) / 21.0
    for mean in means:
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-14)


def test_control_variates_of_clients_never_travel(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: set[bytes] = set()
    groups: set[str] = set()
    real = engine._sealed

    def sealed(message: Message) -> bytes:
        groups.update(message.groups)
        sent.update(t.numpy().tobytes() for b in message.groups.values() for t in b.tensors.values() if t.any())
        return real(message)

    monkeypatch.setattr(engine, "_sealed", sealed)
    # in round 1 alone c_k starts at zero, so that the change that is sent *is* c_k
    result = run(tiny_folder, tmp_path / "a", algorithm="scaffold", trainer=SGD, rounds=3, checkpoint={"keep": 3})
    assert groups == {"params", "control"}
    memories = [engine.codec.read(p) for p in sorted((result.folder / "memories").glob("*/[23].safetensors"))]
    assert len(memories) == 6
    for memory in memories:
        own = {t.numpy().tobytes() for t in memory["control"].tensors.values() if t.any()}
        assert own
        assert not own & sent


def test_one_client_equals_a_plain_loop(tiny_folder: Path, tmp_path: Path) -> None:
    """In fp64, a loop over public libraries that knows nothing of federations ends in the same weights."""
    changes: dict[str, Any] = {"model": {"dtype": "fp64"}, "data": {"clients": 1, "partition": "iid"}}
    changes["trainer"] = {"batch": 64, "packing": False}  # padded, the model's float32 norms round alike on both sides
    result = run(tiny_folder, tmp_path / "a", rounds=1, evaluate=[], **changes)
    recipe = result.recipe
    assets = prepare(recipe, Sink())
    rows = World(recipe, tmp_path, assets, Sink()).rows("client-1")

    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    live = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in live.items():
            p.data = assets.initial[name.removeprefix("base_model.model.").replace(".default.weight", "")].clone()
    optimizer = torch.optim.AdamW(live.values(), lr=1e-2, weight_decay=0.0)
    for _ in range(2):  # the batch holds all rows, so their order does not matter
        losses = []
        for i in range(len(rows)):
            ids, train = rows[i].ids, rows[i].train
            logits = model(input_ids=ids[None]).logits[0, :-1][train[1:]]
            losses.append(functional.cross_entropy(logits, ids[1:][train[1:]], reduction="sum"))
        (sum(losses) / sum(int(rows[i].train[1:].sum()) for i in range(len(rows)))).backward()
        torch.nn.utils.clip_grad_norm_(live.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    trained = adapter(result)
    for name, p in live.items():
        torch.testing.assert_close(trained[name.replace(".default", "")], p.detach(), rtol=0, atol=1e-12)


def test_a_loss_that_is_not_finite_is_never_the_best(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: Iterator[float] = iter([3.0, 2.0, math.nan, -math.inf, 1.9])  # base, then rounds 1 to 4
    patched = lambda self, view: Evaluation({"loss": next(values, 5.0)}, {})
    monkeypatch.setattr(Loss, "evaluate", patched)
    result = run(tiny_folder, tmp_path / "a", rounds=4)
    assert result.summary["best_round"] == 4
    assert (result.folder / "checkpoints" / "best").readlink().name == "4"


def test_a_changed_budget_trains_the_compared_regime_anew(tiny_folder: Path, tmp_path: Path) -> None:
    changes = {"compare": ["centralized"], "evaluate": []}
    first = run(tiny_folder, tmp_path / "a", **changes)
    again = fedloom.resume(first.folder, ["budget=equal_rounds"])
    asked = run(tiny_folder, tmp_path / "b", budget="equal_rounds", **changes)
    central = lambda result: json.loads((result.folder / "regimes" / "centralized" / "summary.json").read_text())
    assert central(again)["adapter_sha256"] == central(asked)["adapter_sha256"]
    assert again.summary["adapter_sha256"] == first.summary["adapter_sha256"]
