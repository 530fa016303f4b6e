"""FedALT: what each client is sent, what moves, and what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.algorithms.by_hand import LAYERS, close, drive, federation, names, ranks, size, wander
from tests.algorithms.worlds import rounds, world
from tests.helpers import run, same, tree

from fedloom import recipe as recipes
from fedloom import slots
from fedloom.algorithms.fedalt import OWN, ROUTERS, WORLD, FedAlt
from fedloom.algorithms.kept import SLOT, WHO
from fedloom.client.adapters import Lora
from fedloom.reevaluate import reevaluate, target
from fedloom.reopen import reopen
from fedloom.tracking import Sink
from fedloom.types import Fit, RecipeError, Tensors

TWO, THREE = {"a": 3, "b": 5}, {"a": 3, "b": 5, "c": 2}


def test_of_two_each_is_the_others_world() -> None:
    them = federation(FedAlt(), TWO, ranks(2))
    them.round()
    assert all(not message.groups for message in them.down.values())
    for _ in range(2):
        before = {name: memory[OWN].tensors for name, memory in them.memories.items()}
        them.round()
        for name, other in (("a", "b"), ("b", "a")):
            assert same(dict(them.down[name].groups[WORLD].tensors), dict(before[other]))


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_the_world_is_the_mean_of_the_others_latest(weighting: Any) -> None:
    them = federation(FedAlt(weighting=weighting), THREE, ranks(2))
    them.round()
    them.round(cohort=["b"])  # `a` and `c` are absent, and count as they were
    latest = {name: memory[OWN].tensors for name, memory in them.memories.items()}
    them.round()
    for name in THREE:
        weight = {n: THREE[n] if weighting == "examples" else 1 for n in THREE if n != name}
        mean = {key: sum(weight[n] * latest[n][key] for n in weight) / sum(weight.values()) for key in latest[name]}
        close(them.down[name].groups[WORLD].tensors, mean)


def test_no_ones_own_adapter_is_in_its_world() -> None:
    """Whatever `a` trains changes the worlds of all but `a`."""
    other = lambda name, round_, effect: wander("x" if name == "a" else name, round_, effect)
    worlds = []
    for solve in (wander, other):
        them = federation(FedAlt(), THREE, ranks(2))
        them.round(solve)
        them.round()
        worlds.append({name: dict(message.groups[WORLD].tensors) for name, message in them.down.items()})
    assert same(worlds[0]["a"], worlds[1]["a"])
    assert not same(worlds[0]["b"], worlds[1]["b"])


def test_what_moves_and_what_is_sent() -> None:
    starts: list[tuple[Fit, Tensors]] = []

    def solve(name: str, round_: int, effect: Fit) -> Tensors:
        ended = wander(name, round_, effect)
        starts.append((effect, ended))
        return ended

    them = federation(FedAlt(), THREE, ranks(2))
    them.round(solve)
    them.round(solve)
    for effect, ended in starts:
        moved = {name for name in ended if not torch.equal(ended[name], effect.start[name])}
        assert moved == {n for n in effect.start if slots.is_main(n) or slots.is_router(n)}
    close(slots.slot(starts[-1][0].start, 1), them.down["c"].groups[WORLD].tensors, 0.0)
    payload = sum(8 * 2 * (d_out + d_in) for d_out, d_in in LAYERS.values())
    for update in them.updates:
        assert not any(map(slots.is_router, names(update.message)))
        assert size(update.message) == size(them.down[update.client]) == payload
    assert all(set(memory) == {OWN, ROUTERS, WHO} for memory in them.memories.values())
    # what the server keeps of a client is what the client has, bit for bit
    for name, memory in them.memories.items():
        assert same(dict(them.state.slots[f"{SLOT}{name}"].tensors), dict(memory[OWN].tensors))


def test_what_is_saved_is_what_would_be_used(tiny_folder: Path, tmp_path: Path) -> None:
    of = world(tiny_folder, tmp_path, algorithm="fedalt")
    state = rounds(of, [(), of.clients[:2]])
    for name in of.clients:
        own = of.engine.at_client(state, name, of.recipe.algorithm.own)
        saved = of.recipe.algorithm.export(state, of.memories.load(name))["personal"]
        assert same(dict(saved), dict(own))
        assert any(float(t.abs().max()) > 0 for key, t in own.items() if slots.is_router(key))
    assert of.recipe.algorithm.export(state) == {}


def test_a_client_that_never_trained_uses_all_of_the_world(tiny_folder: Path, tmp_path: Path) -> None:
    of = world(tiny_folder, tmp_path, algorithm="fedalt", data={"clients": 4, "partition": "iid", "unseen": 0.25})
    before = of.recipe.algorithm.init(of.assets.initial)
    (stranger,) = of.assets.federation.unseen
    absent, *trained = of.clients
    for state, heard in ((before, []), (rounds(of, [trained]), trained)):
        mean = {k: sum(of.memories.load(n)[OWN].tensors[k] for n in heard) / 2 for k in before.params}
        saved = of.recipe.algorithm.export(state, {})["personal"]
        close(saved, mean if heard else before.params)
        for name in (stranger, absent):
            assert same(dict(of.engine.at_client(state, name, of.recipe.algorithm.own)), dict(saved))
    adapted = of.engine.at_client(state, stranger, lambda who, message: of.recipe.algorithm.adapt(who, message, 1))
    assert slots.count(adapted) == 2


def test_a_finished_run_can_be_used(tiny_folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"algorithm": "fedalt", "adapt_steps": 1, "data": {"unseen": 0.34}}
    result = run(tiny_folder, tmp_path / "a", **changes)
    assert {"federated", "federated adapted", "unseen", "unseen adapted"} <= set(result.metrics)
    folders = sorted((result.folder / "adapters").iterdir())
    assert [sorted(p.name for p in (one / "personal").iterdir()) for one in folders] == [
        ["base_model.json", "router.safetensors", "slot0", "slot1"]
    ] * len(folders)
    again = reevaluate(target(str(result.folder), [], None, None), Sink())
    for regime in ("federated", "unseen"):
        assert again.metrics[regime]["loss"]["loss"] == pytest.approx(result.metrics[regime]["loss"]["loss"], abs=1e-9)
    opened = reopen(result.folder, client=folders[0].name)
    kept = reopen(result.folder, "latest", folders[0].name)
    assert same(dict(opened.params), dict(kept.params))
    one = Lora(r=2, alpha=4).read(folders[0] / "personal" / "slot0")
    assert same(one, slots.main(opened.params))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"clients": 1}}, r"data.clients=1: algorithm=fedalt keeps the latest adapters of other clients"),
        ({"server": {"optimizer": "fedavgm"}}, r"server.optimizer=fedavgm, .*there is no adapter of all"),
        ({"server": {"aggregator": "median"}}, r"server.aggregator=median: .*the mean of the others"),
        ({"adapter": {"ranks": [1, 2]}}, r"algorithm=fedalt needs one rank at all clients"),
        ({"adapter": {"name": "ia3"}}, r"algorithm=fedalt works on LoRA factors, which adapter=ia3 has not"),
    ],
)
def test_what_does_not_go_together_is_refused(tiny_folder: Path, changes: dict[str, Any], message: str) -> None:
    given = tree(tiny_folder, algorithm="fedalt", **changes)
    if "name" in changes.get("adapter", {}):
        given["adapter"] = changes["adapter"]
    with pytest.raises(RecipeError, match=message):
        recipes.load(given)


def test_a_router_needs_something_to_choose_from() -> None:
    them = federation(FedAlt(), TWO, ranks(2))
    one = drive(FedAlt().own(them.client("a"), FedAlt().broadcast(them.server, them.state, "a")))
    with pytest.raises(ValueError, match="a router weighs two adapters or more"):
        slots.routed(slots.main(one), routers={})
