"""FedDPA: the global adapter is FedAvg's, the local one stays at home, and every question has its own weight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.algorithms.worlds import rounds, world
from tests.helpers import lines, run, same, tree
from torch.nn import functional

import fedloom
from fedloom import recipe as recipes
from fedloom import slots
from fedloom.algorithms.feddpa import OWN
from fedloom.loop import resume
from fedloom.reevaluate import reevaluate, target
from fedloom.reopen import reopen
from fedloom.runtime import engine
from fedloom.tracking import Sink
from fedloom.types import Bundle, Embed, Losses, Message, RecipeError, ServerState, Tensors
from fedloom.world import World

BOTH = pytest.mark.parametrize("name", ["feddpa-t", "feddpa-f"])
COHORTS: list[list[str]] = [[], ["client-1", "client-2"], []]


def _trained(folder: Path, out: Path, name: str, **knobs: Any) -> tuple[World, ServerState]:
    of = world(folder, out, algorithm={"name": name, **knobs}, rounds=2)
    state = rounds(of)
    of.finish_clients(state)
    return of, state


def _ask(of: World, state: ServerState, client: str, effect: Any) -> Any:
    def steps(*_: Any) -> Any:
        return (yield effect)

    return of.engine.at_client(state, client, steps)


def _nll(of: World, state: ServerState, client: str, params: Tensors | None) -> Any:
    return _ask(of, state, client, Losses(params, "test")).tensors["nll"]


@BOTH
def test_the_global_adapter_is_that_of_fedavg(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Bit for bit, and so are all messages: nothing of a local adapter is in any of them."""
    sent: dict[str, list[Mapping[str, Bundle]]] = {}
    real = engine._sealed

    def seen(message: Message) -> bytes:
        sent.setdefault(str(kind), []).append(message.groups)
        return real(message)

    monkeypatch.setattr(engine, "_sealed", seen)
    ends = []
    for kind in ("fedavg", name):
        of = world(tiny_folder, tmp_path / kind, algorithm=kind, rounds=3)
        ends.append(rounds(of, COHORTS))
    assert same(dict(ends[0].params), dict(ends[1].params))
    assert len(sent["fedavg"]) == len(sent[name])
    for one, other in zip(sent["fedavg"], sent[name], strict=True):
        assert one.keys() == other.keys() == {"params"}
        assert same(dict(one["params"].tensors), dict(other["params"].tensors))


def test_local_steps_come_first_and_begin_with_the_trained_global(tiny_folder: Path, tmp_path: Path) -> None:
    """Against the same rounds written out: in its first round a client keeps G_k, then it trains P beside G."""
    of = world(tiny_folder, tmp_path / "a", algorithm={"name": "feddpa-t", "local_weight": 0.3}, rounds=3)
    plain = world(tiny_folder, tmp_path / "b", algorithm="fedavg", rounds=3)
    state, local = of.recipe.algorithm.init(of.assets.initial), dict[str, Tensors]()
    for round_ in range(3):
        for name in of.clients:
            client, start = plain.engine.client(name, round_), state.params
            if name in local:
                mixture = slots.beside(local[name], start, weights=(0.3, 0.7))
                fitted = plain.engine.drive(client.fit(mixture, trainable=slots.is_main), name, round_)
                assert same(slots.slot(fitted.params, 1), dict(start))
                local[name] = slots.main(fitted.params)
            else:
                local[name] = plain.engine.drive(client.fit(start), name, round_).params
        state = rounds(of, [()], state)
    for name in of.clients:
        assert same(dict(of.memories.load(name)[OWN].tensors), dict(local[name]))


def test_after_the_last_round_everybody_trains_once(tiny_folder: Path, tmp_path: Path) -> None:
    steps = 3
    of = world(tiny_folder, tmp_path, algorithm={"name": "feddpa-f", "local_steps": steps}, rounds=2)
    state = rounds(of, [of.clients[:1], of.clients[:2]])  # the last client was never sampled
    assert all(of.memories.load(name) == {} for name in of.clients)
    before = of.totals.bytes_down
    of.finish_clients(state)
    for name in of.clients:
        fitted = of.engine.drive(of.engine.client(name, 2).fit(state.params, steps=range(steps)), name, 2)
        assert same(dict(of.memories.load(name)[OWN].tensors), dict(fitted.params))
        assert fitted.steps == steps
    assert of.totals.bytes_up == 0
    assert of.totals.bytes_down - before == len(of.clients) * len(
        engine._sealed(Message({"params": Bundle(state.params)}))
    )
    assert of.totals.tokens > 0
    booked = [line for line in lines(tmp_path / "metrics.jsonl") if line["name"] == "finish/steps"]
    assert [(line["client"], line["value"]) for line in booked] == [(name, steps) for name in of.clients]


@BOTH
def test_without_weight_it_is_fedavg_and_with_all_of_it_local(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    of, state = _trained(tiny_folder, tmp_path, name, scale=0.0)
    client = of.clients[0]
    memory, mixed = of.memories.load(client), of.recipe.algorithm._mixed
    for weight, alone in ((0.0, state.params), (1.0, memory[OWN].tensors)):
        expected = _nll(of, state, client, alone)
        found = _nll(of, state, client, mixed(memory, state.params, weight))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    sums = of.engine.evaluate(state, client, "test").scalars
    assert sums["nll"] == pytest.approx(float(_nll(of, state, client, state.params).sum()), rel=1e-12)
    assert not torch.allclose(_nll(of, state, client, state.params), _nll(of, state, client, memory[OWN].tensors))


@BOTH
@pytest.mark.parametrize("grid", [0.0, 0.02])
def test_every_row_has_its_own_weight(tiny_folder: Path, tmp_path: Path, name: str, grid: float) -> None:
    """Against one row after another, each with the adapter that a naive reading of the equations gives it."""
    of, state = _trained(tiny_folder, tmp_path, name, scale=1.0, grid=grid, instances=3)
    client = of.clients[1]
    memory = of.memories.load(client)
    local = memory[OWN].tensors
    seen = of.engine.client(client, 2)
    drawn = torch.randperm(seen.examples, generator=seen.stream("instances"))[:3].tolist()
    train, test = (_ask(of, state, client, Embed(local, split)) for split in ("train", "test"))
    total, weights = 0.0, []
    for row, e in enumerate(test):
        cosines = [float(functional.cosine_similarity(e.double(), train[i].double(), dim=0)) for i in drawn]
        weight = sum(cosines) / 3
        weight = round(weight / grid) * grid if grid else weight
        weights.append(min(1.0, max(0.0, weight)))
        adapter = slots.beside(local, state.params, weights=(weights[-1], 1 - weights[-1]))
        total += float(_nll(of, state, client, adapter)[row])
    found = of.engine.evaluate(state, client, "test").scalars
    assert found["nll"] == pytest.approx(total, rel=1e-12)
    score = of.engine.drive(seen.score(state.params, "test"), client, 2).scalars
    assert {key: found[key] for key in ("tokens", "bytes", "examples")} == {
        key: score[key] for key in ("tokens", "bytes", "examples")
    }
    pairs = of.engine.hands.desk.pairs(of.engine.hands.rows(client, "test").indices)
    prompts = of.engine.hands.desk.prompts(pair.question for pair in pairs)
    suited = of.engine.at_client(state, client, lambda c, m: of.recipe.algorithm.suited(c, m, prompts))
    assert list(suited.keys) == pytest.approx(weights, abs=1e-9)
    some = suited.make(suited.keys[0])
    assert float(next(t for key, t in some.items() if key.endswith(".mix"))[0]) == suited.keys[0]


def test_a_question_that_equals_the_instances_has_the_weight_scale(tiny_folder: Path, tmp_path: Path) -> None:
    of, state = _trained(tiny_folder, tmp_path, "feddpa-f", scale=0.8, grid=0.0, instances=1)
    seen = of.engine.client(of.clients[0], 2)
    (drawn,) = torch.randperm(seen.examples, generator=seen.stream("instances"))[:1].tolist()
    hands = of.engine.hands
    (pair,) = hands.desk.pairs(hands.rows(seen.name, "train").indices[[drawn]])
    prompts = hands.desk.prompts([pair.question, "What is a verb?"])
    suited = of.engine.at_client(state, seen.name, lambda c, m: of.recipe.algorithm.suited(c, m, prompts))
    assert suited.keys[0] == pytest.approx(0.8, abs=1e-6)
    assert suited.keys[1] < 0.8 - 1e-6


@BOTH
def test_a_finished_run_can_be_used(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    changes: dict[str, Any] = {"algorithm": name, "adapt_steps": 1, "data": {"unseen": 0.34}}
    result = run(tiny_folder, tmp_path / "a", **changes)
    assert {"federated", "federated adapted", "unseen", "unseen adapted"} <= set(result.metrics)
    again = reevaluate(target(str(result.folder), [], None, None), Sink())
    for regime in ("federated", "unseen"):
        assert again.metrics[regime]["loss"]["loss"] == pytest.approx(result.metrics[regime]["loss"]["loss"], abs=1e-9)
    client = sorted(p.name for p in (result.folder / "adapters").iterdir())[0]
    opened, kept = reopen(result.folder, client=client), reopen(result.folder, "latest", client)
    one, other = opened.params, slots.collapsed(kept.params, kept.attached.scale)
    assert same(dict(one), dict(other))


def test_going_on_longer_equals_a_longer_run(tiny_folder: Path, tmp_path: Path) -> None:
    """What clients did after the last round is forgotten once it is not the last any more."""
    changes = {"algorithm": {"name": "feddpa-f", "local_steps": 1}, "evaluate": []}
    longer = run(tiny_folder, tmp_path / "a", rounds=3, **changes)
    short = run(tiny_folder, tmp_path / "b", rounds=2, **changes)
    assert sorted(p.name for p in (short.folder / "memories" / "client-1").iterdir()) == ["2.5.safetensors"]
    extended = resume(short.folder, ["rounds=+1"])
    assert extended.summary["adapter_sha256"] == longer.summary["adapter_sha256"]
    assert sorted(p.name for p in (short.folder / "memories" / "client-1").iterdir()) == ["3.5.safetensors"]


@pytest.mark.parametrize("when", ["within", "before the books", "after"])
def test_an_interrupted_end_is_made_up_for(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    changes = {"algorithm": {"name": "feddpa-f", "local_steps": 1}, "evaluate": [], "runtime": {"cohort": 1}}
    whole = run(tiny_folder, tmp_path / "a", **changes)
    place, method = {
        "within": (engine.Engine, "finish_some"),
        "before the books": (fedloom.checkpoint.Checkpoints, "amend"),
        "after": (World, "finish"),
    }[when]
    with monkeypatch.context() as patch:
        calls: list[int] = []
        real = getattr(place, method)

        def broken(*given: Any) -> Any:
            calls.append(1)
            if len(calls) == (2 if when == "within" else 1):
                raise KeyboardInterrupt
            return real(*given)

        patch.setattr(place, method, broken)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_folder, tmp_path / "b", **changes)
    resumed = resume(tmp_path / "b")
    for key in ("adapter_sha256", "bytes_down", "bytes_up", "trained_tokens", "participations", "train_loss_last"):
        assert resumed.summary[key] == whole.summary[key], key
    keys = lambda path: [(line["round"], line["client"], line["name"]) for line in lines(path / "metrics.jsonl")]
    assert keys(tmp_path / "a") == keys(tmp_path / "b")


@BOTH
def test_what_does_not_go_together_is_refused(tiny_folder: Path, name: str) -> None:
    for changes, message in (
        ({"algorithm": {"scale": 1.5}}, "algorithm.*scale"),
        ({"adapter": {"ranks": [1, 2]}}, f"algorithm={name} needs one rank at all clients"),
    ):
        given = tree(tiny_folder, algorithm={"name": name}, **{k: v for k, v in changes.items() if k != "algorithm"})
        given["algorithm"] = {**given["algorithm"], **changes.get("algorithm", {})}
        with pytest.raises(RecipeError, match=message):
            recipes.load(given)
    given = {**tree(tiny_folder, algorithm=name), "adapter": {"name": "ia3"}}
    with pytest.raises(RecipeError, match=f"algorithm={name} works on LoRA factors"):
        recipes.load(given)


@pytest.mark.slow
def test_workers_end_a_run_as_one_process_does(tiny_folder: Path, tmp_path: Path) -> None:
    ends = []
    for runtime in ({"name": "local"}, {"name": "processes", "workers": 2}):
        changes = {"algorithm": {"name": "feddpa-f", "local_steps": 1}, "rounds": 1}
        place = tmp_path / str(runtime["name"])
        ends.append(run(tiny_folder, place, **changes, runtime={**runtime, "threads": 1, "cohort": 1}).summary)
    for key in ("adapter_sha256", "bytes_down", "trained_tokens", "metrics"):
        assert ends[0][key] == ends[1][key], key
