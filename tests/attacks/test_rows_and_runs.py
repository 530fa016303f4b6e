"""Poisoned rows reach their owner alone; what attacks do to a run, and what defences keep of it."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import adapter, lines, run, same, tree
from torch import Tensor

import fedloom
from fedloom import recipe as recipes
from fedloom.assets import prepare
from fedloom.attacks import Attack
from fedloom.checkpoint import MemoryStore
from fedloom.runtime import pipes
from fedloom.tracking import Plan, Sink
from fedloom.types import DataError, RecipeError
from fedloom.world import set_stage

FIVE = {"data": {"clients": 5, "partition": "iid", "source": {"name": "tasks", "rows_per_category": 10}}}


def test_an_algorithm_without_shared_weights_cannot_be_attacked(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="sends no shared weights"):
        run(tiny_folder, tmp_path / "a", algorithm="local", attacks=["sign-flip"])


def test_attackers_that_are_too_many_for_the_real_cohort(tiny_folder: Path, tmp_path: Path) -> None:
    """Clients kept out of training are known only once the rows are there."""
    with pytest.raises(RecipeError, match="krum needs at least 5 updates a round"):
        data = {**FIVE["data"], "unseen": 0.2}
        run(tiny_folder, tmp_path / "a", data=data, server={"aggregator": "krum"})


def stage_of(folder: Path, **changes: Any) -> Any:
    recipe = recipes.load(tree(folder, **changes))
    assets = prepare(recipe, Sink())
    return set_stage(recipe, assets, MemoryStore(folder / "none"), Sink())[0], assets


@pytest.mark.parametrize(
    "attack", [{"name": "label-flip"}, {"name": "backdoor", "trigger": "zq", "target": "swordfish"}]
)
def test_poisoned_rows_reach_the_attacker_alone(tiny_folder: Path, attack: Any) -> None:
    changes = {**FIVE, "attacks": [{**attack, "clients": ["client-1"]}]}
    stage, assets = stage_of(tiny_folder, **changes)
    plain, _ = stage_of(tiny_folder, **FIVE)
    split = assets.federation
    n = len(split.encoded)
    for name, data in split.clients.items():
        mine = stage.clients[name]
        assert (mine.test == data.test).all()
        assert (mine.validation == data.validation).all()
        if name != "client-1":
            assert (mine.train == data.train).all()
    new = stage.clients["client-1"].train
    assert (new >= n).all()
    assert len(new) == len(split.clients["client-1"].train)
    assert (stage.encoded.ids[: len(split.encoded.ids)] == split.encoded.ids).all()
    assert len(stage.encoded) == n + len(new) == len(split.encoded) + len(new)
    tokenizer = assets.loaded.tokenizer
    texts = [tokenizer.decode(stage.encoded.example(i).ids) for i in new]
    old = [tokenizer.decode(split.encoded.example(i).ids) for i in split.clients["client-1"].train]
    moved = sum(a != b for a, b in zip(texts, old, strict=True))
    if attack["name"] == "backdoor":
        assert moved == math.ceil(len(new) / 2) == sum("zq " in text and "swordfish" in text for text in texts)
        answer = stage.encoded.example(next(i for i, t in zip(new, texts, strict=True) if "zq " in t))
        assert tokenizer.decode(answer.ids[answer.train]).strip().startswith("swordfish")
    else:
        assert moved > len(new) // 2
        assert Counter(_answers(stage.encoded, new)) == Counter(
            _answers(split.encoded, split.clients["client-1"].train)
        )
    assert pipes.fingerprint(stage) != pipes.fingerprint(plain)
    assert plain.encoded is not stage.encoded


def _answers(encoded: Any, where: Any) -> list[bytes]:
    return [bytes(encoded.example(int(i)).ids[encoded.example(int(i)).train].numpy()) for i in where]


def test_two_attacks_on_the_rows_of_one_client(tiny_folder: Path) -> None:
    both = [
        {"name": "label-flip", "clients": ["client-1"]},
        {"name": "backdoor", "clients": ["client-1"], "trigger": "zq"},
    ]
    stage, assets = stage_of(tiny_folder, **FIVE, attacks=both)
    texts = [assets.loaded.tokenizer.decode(stage.encoded.example(i).ids) for i in stage.clients["client-1"].train]
    assert len(texts) == len(assets.federation.clients["client-1"].train)
    assert 0 < sum("zq " in text for text in texts) < len(texts)


def test_poisoned_rows_that_are_too_long(tiny_folder: Path) -> None:
    attack = {"name": "backdoor", "trigger": "x" * 600, "poison_ratio": 1.0, "clients": ["client-2"]}
    with pytest.raises(DataError, match=r"the poisoned rows of client-2: no row is left: .* raise data.max_tokens"):
        stage_of(tiny_folder, **FIVE, attacks=[attack])
    some = {**attack, "poison_ratio": 0.5}
    stage, assets = stage_of(tiny_folder, **FIVE, attacks=[some])
    whole = len(assets.federation.clients["client-2"].train)
    assert len(stage.clients["client-2"].train) == whole - math.ceil(whole / 2)


def test_each_of_several_attackers_has_its_own_rows(tiny_folder: Path) -> None:
    names = ["client-1", "client-2", "client-4"]
    attack = {"name": "backdoor", "trigger": "zq", "poison_ratio": 1.0, "clients": names}
    stage, assets = stage_of(tiny_folder, **FIVE, attacks=[attack])
    split, decode = assets.federation, assets.loaded.tokenizer.decode
    for name in names:
        own = [split.rows[i].turns[0].text for i in split.clients[name].train]
        texts = [decode(stage.encoded.example(int(i)).ids) for i in stage.clients[name].train]
        assert all(f"zq {question}" in text for question, text in zip(own, texts, strict=True))
    assert len(stage.encoded) == len(split.encoded) + sum(len(stage.clients[name].train) for name in names)


STEPS = {"trainer": {"steps": 4, "batch": 4, "lr": 3e-2}, "rounds": 3}


def test_robust_rules_keep_what_a_mean_loses(tiny_folder: Path, tmp_path: Path) -> None:
    """One of five clients turns its update round, ten times as long."""
    attack = [{"name": "sign-flip", "scale": 10, "clients": ["client-2"]}]
    losses = {}
    for rule in ("mean", "median", "krum", "geometric-median"):
        result = run(
            tiny_folder,
            tmp_path / rule,
            **FIVE,
            **STEPS,
            attacks=attack,
            server={"aggregator": rule},
            evaluate=["loss"],
        )
        losses[rule] = result.metrics["federated"]["loss"]["loss"]
    clean = run(tiny_folder, tmp_path / "clean", **FIVE, **STEPS, evaluate=["loss"])
    base = clean.metrics["base"]["loss"]["loss"]
    assert clean.metrics["federated"]["loss"]["loss"] < base
    assert losses["mean"] > base
    for rule, loss in losses.items():
        assert rule == "mean" or loss < base, (rule, losses)


RUN: list[dict[str, Any]] = [
    {"name": "krum", "distance": "product"},
    {"name": "bulyan", "f": 0, "distance": "product"},
    {"name": "median"},
]
KEPT: list[dict[str, Any]] = [
    {"name": "centered-clipping", "tau": 0.1},
    {"name": "foolsgold"},
    {"name": "norm-bound", "noise": 1e-3},
    {"name": "dnc", "coordinates": 50},
]


@pytest.mark.parametrize("rule", RUN, ids=lambda rule: rule["name"])
def test_rules_that_keep_nothing_run(tiny_folder: Path, tmp_path: Path, rule: dict[str, Any]) -> None:
    changes = {**FIVE, "server": {"aggregator": rule}, "evaluate": []}
    assert run(tiny_folder, tmp_path / "a", **changes).summary["rounds"] == 2


@pytest.mark.parametrize("rule", KEPT, ids=lambda rule: rule["name"])
def test_rules_with_a_state_or_draws_resume(tiny_folder: Path, tmp_path: Path, rule: dict[str, Any]) -> None:
    changes = {**FIVE, "server": {"aggregator": rule}, "attacks": ["gaussian"], "evaluate": []}
    whole = run(tiny_folder, tmp_path / "a", **changes)
    run(tiny_folder, tmp_path / "b", **changes, rounds=1)
    longer = fedloom.resume(tmp_path / "b", ["rounds=2"])
    assert longer.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    assert same(adapter(longer), adapter(whole))


def test_every_attack_changes_a_run_and_those_on_rows_resume(tiny_folder: Path, tmp_path: Path) -> None:
    seen = {run(tiny_folder, tmp_path / "clean", **FIVE, evaluate=[]).summary["adapter_sha256"]}
    for name in sorted(Attack.known):
        changes = {**FIVE, "attacks": [{"name": name, "share": 0.4}], "evaluate": []}
        whole = run(tiny_folder, tmp_path / name, **changes)
        seen.add(whole.summary["adapter_sha256"])
        if name == "backdoor":
            run(tiny_folder, tmp_path / "b", **changes, rounds=1)
            longer = fedloom.resume(tmp_path / "b", ["rounds=2"])
            assert longer.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    assert len(seen) == 1 + len(Attack.known) == 9


def test_worker_processes_have_the_poisoned_rows(tiny_folder: Path, tmp_path: Path) -> None:
    changes = {**FIVE, "attacks": ["backdoor", "alie"], "server": {"aggregator": "foolsgold"}, "evaluate": []}
    one = run(tiny_folder, tmp_path / "a", **changes)
    workers = {"name": "processes", "workers": 2, "threads": 1, "cohort": 1}
    two = run(tiny_folder, tmp_path / "b", **changes, runtime=workers)
    assert same(adapter(one), adapter(two))


def test_compared_regimes_are_not_attacked(tiny_folder: Path, tmp_path: Path) -> None:
    attack = [{"name": "backdoor", "clients": ["client-1"]}]
    changes = {**FIVE, "compare": ["local", "centralized"], "budget": "equal_rounds", "evaluate": ["loss"]}
    attacked = run(tiny_folder, tmp_path / "a", **changes, attacks=attack, server={"aggregator": "krum"})
    clean = run(tiny_folder, tmp_path / "b", **changes)
    for regime in ("local", "centralized"):
        assert attacked.metrics[regime] == clean.metrics[regime]
        other = recipes.load(tmp_path / "a" / "regimes" / regime / "recipe.yaml")
        assert other.attacks == ()
        assert other.server.aggregator.part_name == "mean"
    assert attacked.metrics["federated"] != clean.metrics["federated"]


class Told(Sink):
    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def on(self, event: Any) -> None:
        if isinstance(event, Plan):
            self.lines += event.lines


def test_the_plan_names_the_attackers(tiny_folder: Path, tmp_path: Path) -> None:
    told = Told()
    attack = [{"name": "sign-flip", "clients": ["client-1", "client-2"], "start": 1}]
    result = fedloom.run(tree(tiny_folder, **FIVE, attacks=attack), out=tmp_path / "a", sink=told)
    assert ("attackers", "sign-flip by client-1, client-2, from round 2 on") in told.lines
    found = [line for line in lines(result.folder / "metrics.jsonl") if line["name"] == "train_loss"]
    assert len(found) == 2
    assert isinstance(next(iter(adapter(result).values())), Tensor)
