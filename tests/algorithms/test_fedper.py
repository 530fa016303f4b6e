"""FedPer and FedRep: what is private by name, the neutral cases, the phases, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.algorithms.worlds import rounds, world
from tests.helpers import run, same, tree
from tests.messages import payload, watched

from fedloom import recipe as recipes
from fedloom import tensors
from fedloom.algorithms.fedper import OWN, FedPer
from fedloom.algorithms.fedrep import FedRep
from fedloom.runtime import effects
from fedloom.types import RecipeError

COHORTS = [(), ("client-1", "client-3"), ()]
EPOCH = {"trainer": {"steps": 4}}


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_nothing_private_is_fedavg_and_all_private_is_local(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    plain = rounds(world(tiny_folder, tmp_path / "a"), COHORTS)
    none = world(tiny_folder, tmp_path / "b", algorithm={"name": name, "private": "none"})
    state = rounds(none, COHORTS)
    assert same(dict(state.params), dict(plain.params))
    assert same(dict(none.recipe.algorithm.export(state)["shared"]), dict(plain.params))
    assert none.memories.load("client-1") == {}
    alone = world(tiny_folder, tmp_path / "c", algorithm="local")
    rounds(alone, COHORTS)
    every = world(tiny_folder, tmp_path / "d", algorithm={"name": name, "private": "all"})
    with watched() as seen:
        state = rounds(every, COHORTS)
    assert all(payload(passed.up) == payload(passed.down) == 0 for passed in seen)
    for client in every.clients:
        local = alone.memories.load(client)["adapter"].tensors
        assert same(dict(every.memories.load(client)[OWN].tensors), dict(local))
        own = every.engine.at_client(state, client, every.recipe.algorithm.own)
        assert same(dict(own), dict(local))


def test_private_b_is_fedsa_lora(tiny_folder: Path, tmp_path: Path) -> None:
    a = world(tiny_folder, tmp_path / "a", algorithm="fedsa-lora")
    b = world(tiny_folder, tmp_path / "b", algorithm={"name": "fedper", "private": ["*.lora_B"]})
    states = [rounds(one, COHORTS) for one in (a, b)]
    assert same(dict(states[0].params), dict(states[1].params))
    for client in a.clients:
        kept = [next(iter(one.memories.load(client).values())).tensors for one in (a, b)]
        assert same(dict(kept[0]), dict(kept[1]))


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_private_tensors_never_travel(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    algorithm = {"name": name, "private": ["*.layers.1.*", "*.v_proj.lora_A"]}
    them = world(tiny_folder, tmp_path, algorithm=algorithm)
    with watched() as seen:
        state = rounds(them, COHORTS)
    every = set(them.assets.initial)
    private = {n for n in every if ".layers.1." in n or n.endswith(".v_proj.lora_A")}
    size = tensors.nbytes({n: t for n, t in them.assets.initial.items() if n not in private})
    for passed in seen:
        for message in (passed.up, passed.down):
            assert set(message.groups) == {"params"}
            assert set(message.groups["params"].tensors) == every - private
            assert payload(message) == size
    for client in them.clients:
        memory = them.memories.load(client)
        assert set(memory[OWN].tensors) == private
        own = dict(them.engine.at_client(state, client, them.recipe.algorithm.own))
        assert same(own, dict(them.recipe.algorithm.export(state, memory)["personal"]))
        assert all(torch.equal(own[n], memory[OWN].tensors[n] if n in private else state.params[n]) for n in every)
    # what is private stays where everybody begins, for those that never train
    assert all(torch.equal(state.params[n], them.assets.initial[n]) for n in private)
    assert not any(torch.equal(state.params[n], them.assets.initial[n]) for n in every - private)


def test_the_phases_of_fedrep(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[tuple[Any, Any]] = []
    real = effects.fit.fit

    def noted(bench: Any, jobs: Any) -> Any:
        answers = real(bench, jobs)
        fits.extend((job.effect, answer) for job, answer in zip(jobs, answers, strict=True))
        return answers

    monkeypatch.setattr(effects.fit, "fit", noted)
    algorithm = {"name": "fedrep", "private_steps": 1, "private_lr": 0.02, "shared_lr": 0.003}
    rounds(world(tiny_folder, tmp_path, algorithm=algorithm, **EPOCH), [("client-1",)])
    (first, head), (second, body) = fits
    for effect, fitted, ending in ((first, head, "lora_B"), (second, body, "lora_A")):
        moved = {n for n, t in fitted.params.items() if not torch.equal(t, effect.start[n])}
        assert moved == {n for n in effect.start if n.endswith(ending)}
    assert (head.steps, body.steps, head.lr, body.lr) == (1, 3, 0.02, 0.003)
    assert list(second.steps) == [1, 2, 3]
    assert same(dict(second.start), dict(head.params))


def test_halves_and_short_rounds() -> None:
    from tests.algorithms.bowls import Bowl, Federation

    for steps, wanted, turn in ((5, None, 2), (4, 3, 3), (2, 3, 2)):
        them = Federation(FedRep(private=("h",), private_steps=wanted), {"a": Bowl(1.0, 1.0, steps)}, _split())
        assert FedRep(private=("h",), private_steps=wanted)._turn(them.client("a"), _split()) == (turn, steps)
        them.round()
        assert them.updates[0].metrics["steps"] == steps


def _split() -> dict[str, torch.Tensor]:
    return {"h": torch.zeros(2, dtype=torch.float64), "w": torch.zeros(2, dtype=torch.float64)}


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
@pytest.mark.parametrize(
    ("private", "message"),
    [
        (["*norm*"], r"algorithm.private: '\*norm\*' matches none of the adapter's 16 tensors.*private=none"),
        (["*.lora_B", "*.layers.7.*"], r"'\*.layers.7.\*' matches none"),
        (["*"], r"matches all 16 tensors.*set algorithm.private=all"),
        (["*.lora_A", "*.lora_B"], "matches all 16 tensors"),
    ],
)
def test_patterns_that_miss_are_refused_before_the_first_round(
    tiny_folder: Path, tmp_path: Path, name: str, private: list[str], message: str
) -> None:
    algorithm = {"name": name, "private": private}
    adapter = {"targets": ["q_proj", "v_proj", "k_proj", "o_proj"]}
    with pytest.raises(RecipeError, match=message):
        run(tiny_folder, tmp_path / "a", algorithm=algorithm, adapter=adapter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": {"name": "fedper", "private": []}}, "write algorithm.private=none"),
        ({"algorithm": {"name": "fedper", "private": "some"}}, "'none' or 'all'"),
        (
            {"algorithm": {"name": "fedper", "private": "all"}, "server": {"aggregator": "median"}},
            "with algorithm.private=all nothing is combined; set server.aggregator=mean",
        ),
        (
            {"algorithm": "fedper", "server": {"aggregator": {"name": "krum", "distance": "product"}}},
            "set server.aggregator.distance=factors",
        ),
        ({"algorithm": {"name": "fedrep", "private_steps": 2}}, "leaves none of trainer.steps=2"),
        ({"algorithm": "fedrep", "trainer": {"steps": 1}}, "has but one step"),
        ({"algorithm": "fedrep", "trainer": {"decay": 0.5}}, "decay would begin anew"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_folder: Path, changes: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.load(tree(tiny_folder, **changes))


def test_norms_of_whole_models() -> None:
    """FedBN where all weights are trained."""
    bn = FedPer(private=("*norm*",))
    names = ["model.layers.0.input_layernorm.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"]
    assert list(bn.check(names)) == []
    assert [bn.keeps(name) for name in names] == [True, True, False]
