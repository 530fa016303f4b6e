"""PF2LoRA: a private adapter of lower rank upon the shared one; without it, FedAvg."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.algorithms.by_hand import LAYERS, federation, names, ranks, size, wander
from tests.algorithms.worlds import rounds, world
from tests.helpers import run, same, tree

from fedloom import recipe as recipes
from fedloom import slots
from fedloom.algorithms.pf2lora import OWN, Pf2Lora
from fedloom.reopen import reopen
from fedloom.types import Fit, RecipeError, Tensors


def test_without_lower_steps_it_is_fedavg(tiny_folder: Path, tmp_path: Path) -> None:
    ends = []
    for name in ("fedavg", "pf2lora"):
        algorithm = {"name": name, **({"lower_steps": 0} if name == "pf2lora" else {})}
        of = world(tiny_folder, tmp_path / name, algorithm=algorithm, adapter={"dropout": 0.1})
        ends.append((rounds(of), of))
    (fedavg, _), (state, of) = ends
    assert same(dict(fedavg.params), dict(state.params))
    for name in of.clients:
        assert of.memories.load(name) == {}
        assert same(dict(of.engine.at_client(state, name, of.recipe.algorithm.own)), dict(state.params))


def test_the_levels_move_in_turn() -> None:
    asked: list[tuple[Fit, Tensors]] = []

    def solve(name: str, round_: int, effect: Fit) -> Tensors:
        ended = wander(name, round_, effect)
        asked.append((effect, ended))
        return ended

    them = federation(Pf2Lora(rank=1, lower_steps=3, lower_lr=0.5), {"a": 1}, ranks(2))
    for round_ in range(2):
        asked.clear()
        them.round(solve)
        (lower, private), (upper, whole) = asked
        assert same(dict(upper.start), dict(private))
        assert (list(lower.steps or ()), lower.lr) == ([0, 1, 2], 0.5)
        assert (upper.steps, upper.lr) == (None, None)
        moved = [{n for n in end if not torch.equal(end[n], of.start[n])} for of, end in asked]
        assert moved[1] == {n for n in whole if slots.is_main(n)}
        assert moved[0] == set(whole) - moved[1]
        assert same(slots.main(lower.start), dict(them.down["a"].groups["params"].tensors))
        assert same(slots.slot(whole, 1), dict(them.memories["a"][OWN].tensors))
        if round_ == 0:
            assert all(float(t.abs().max()) == 0 for n, t in lower.start.items() if ".slot1.lora_B" in n)
    (update,) = them.updates
    assert not any(map(slots.slot_of, names(update.message)))
    assert (
        size(update.message) == size(them.down["a"]) == sum(8 * 2 * (d_out + d_in) for d_out, d_in in LAYERS.values())
    )


def test_a_private_adapter_adapts_to_its_clients_rows(tiny_folder: Path, tmp_path: Path) -> None:
    of = world(tiny_folder, tmp_path, algorithm={"name": "pf2lora", "rank": 1, "lower_steps": 4}, trainer={"batch": 3})
    state = rounds(of, [(), (), ()])
    client = of.clients[0]
    own = of.engine.at_client(state, client, of.recipe.algorithm.own)
    seen = of.engine.client(client, 3)
    shared, both = (of.engine.drive(seen.score(p, "train"), client, 3).scalars["nll"] for p in (state.params, own))
    assert both < shared
    adapted = of.engine.at_client(state, client, lambda c, m: of.recipe.algorithm.adapt(c, m, 2))
    assert same(slots.main(adapted), dict(state.params))
    assert not same(slots.slot(adapted, 1), slots.slot(own, 1))


def test_a_finished_run_can_be_used(tiny_folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"algorithm": {"name": "pf2lora", "rank": 1}, "data": {"unseen": 0.34}, "adapt_steps": 1}
    result = run(tiny_folder, tmp_path / "a", **changes)
    assert {"federated", "federated adapted", "unseen", "unseen adapted"} <= set(result.metrics)
    client = next((result.folder / "adapters").iterdir()).name
    opened, kept = reopen(result.folder, client=client), reopen(result.folder, "latest", client)
    assert slots.count(kept.params) == 2
    assert same(dict(opened.params), dict(slots.collapsed(kept.params, kept.attached.scale)))
    assert {len(t) for n, t in opened.params.items() if n.endswith("lora_A")} == {2 + 1}


def test_a_private_rank_above_the_shared_one_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"algorithm.rank=3 .* adapter.r=2; allowed: 1 to 2"):
        recipes.load(tree(tiny_folder, algorithm={"name": "pf2lora", "rank": 3}))
