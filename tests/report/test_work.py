"""What clients do beside training: its operations against torch's counter, and where a run books them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.algorithms.worlds import world
from tests.helpers import lines, run
from tests.report.test_cost import Counter

import fedloom
from fedloom import cost
from fedloom.evaluate.view import RegimeView
from fedloom.report import write_report
from fedloom.types import Effect, Embed, Generate, Gradient, Losses, Pair, Score

PLAIN = {
    "model": {"attention": "eager"},
    "trainer": {"packing": False},
    # one row of each split a client, so that no pass has padding
    "data": {"source": {"rows_per_category": 3}, "splits": {"train": 0.34, "validation": 0.33, "test": 0.33}},
    "evaluate": [],
}
FAIR = {"name": "qfedavg", "lipschitz": 1}


def _asked(kind: str, params: Any) -> tuple[cost.Phase, Effect]:
    """Return an effect that asks for that kind of work."""
    match kind:
        case "score":
            return "score", Score(params, "train")
        case "losses":
            return "score", Losses(params)
        case "pairs":
            return "score", Losses(params, pairs=[Pair("How many legs has a cat, and how many a bird?", "4 and 2")])
        case "embed":
            return "embed", Embed(params, prompts=["one two three four five six"])
        case "generate":
            return "generate", Generate(params, ["a long prompt, of many letters, " * 6], max_new_tokens=24)
    return "gradient", Gradient(params, 1)


@pytest.mark.parametrize("kind", ["score", "losses", "pairs", "embed", "generate", "gradient"])
def test_the_booked_operations_are_what_torch_counts(
    kind: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fedloom.client.prompts.ROOM", 0
    )  # places of a cache that no token has taken are multiplied too
    of = world(tiny_folder, tmp_path, **PLAIN)
    hands = of.engine.hands
    for params in (of.assets.initial, *([None] if kind != "gradient" else [])):
        phase, effect = _asked(kind, params)
        with Counter() as counter:
            hands.perform({0: effect}, ["client-1"], 0)
        found = hands.taken("client-1")
        assert list(found.flops) == list(found.seconds) == [phase]
        assert found.flops[phase] == pytest.approx(counter.total, rel=1e-3)
        assert found.seconds[phase] > 0
        assert not hands.all_taken()


@pytest.mark.parametrize("kind", ["prefix-tuning", "prompt-tuning"])
def test_virtual_tokens_are_in_an_answer(
    kind: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloom.client.prompts.ROOM", 0)
    of = world(tiny_folder, tmp_path, **PLAIN, adapter={"name": kind})
    with Counter() as counter:
        of.engine.hands.perform({0: _asked("generate", of.assets.initial)[1]}, ["client-1"], 0)
    assert of.engine.hands.taken("client-1").flops["generate"] == pytest.approx(counter.total, rel=0.05)


def test_evaluators_are_counted(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom.client.prompts.ROOM", 0)
    of = world(tiny_folder, tmp_path, **PLAIN)
    state = of.recipe.algorithm.init(of.assets.initial)
    view = RegimeView(of.engine, of.assets.federation, of.recipe, state, "federated", "test")

    def lent() -> None:
        with view.model(of.assets.initial) as (model, tokenizer), torch.inference_mode():
            ids = tokenizer(["some text"], return_tensors="pt")["input_ids"]
            model.generate(input_ids=ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)

    for work in (
        lambda: view.generate(of.assets.initial, ["one two three"], 5),
        lambda: view.likelihoods(None, [("one two", " three"), ("one two", " thrice and more")][:1]),
        view.losses,
        lent,
    ):
        with Counter() as counter:
            work()
        booked = of.engine.hands.all_taken().values()
        assert sum(sum(one.flops.values()) for one in booked) == counter.total > 0


def test_continuations_of_one_reading_are_counted_once(tiny_folder: Path, tmp_path: Path) -> None:
    of = world(tiny_folder, tmp_path, **PLAIN)
    state = of.recipe.algorithm.init(of.assets.initial)
    view = RegimeView(of.engine, of.assets.federation, of.recipe, state, "federated", "test")
    found = []
    for pairs in ([("one or two?", " A")], [("one or two?", " A"), ("one or two?", " B")]):
        view.likelihoods(None, pairs)
        found.append(of.engine.hands.all_taken()["server"].flops["score"])
    assert found[1] < 1.2 * found[0]


def _told(folder: Path, name: str, *, of_clients: bool) -> dict[tuple[int, str], float]:
    found = [one for one in lines(folder / "metrics.jsonl") if one["name"] == name]
    return {(one["round"], one["client"]): one["value"] for one in found if (one["client"] is not None) == of_clients}


def _agree(result: fedloom.Result, name: str) -> float:
    """Return a cost of the whole run, which clients, rounds and the summary tell alike."""
    whole = float(result.summary[name])
    for of_clients in (True, False):
        assert sum(_told(result.folder, name, of_clients=of_clients).values()) == pytest.approx(whole)
    return whole


def test_a_run_books_what_clients_do_beside_training(tiny_folder: Path, tmp_path: Path) -> None:
    plain = run(tiny_folder, tmp_path / "plain", sampler={"count": 2})
    fair = run(tiny_folder, tmp_path / "fair", sampler={"count": 2}, algorithm=FAIR)
    for key in ("flops", "trained_tokens", "samples"):
        assert plain.summary[key] == fair.summary[key]
    assert cost.beside(plain.summary, "flops") == cost.beside(plain.summary, "seconds") == 0
    assert not any("score" in one["name"] for one in lines(plain.folder / "metrics.jsonl"))
    scored, seconds = _agree(fair, "score_flops"), _agree(fair, "score_seconds")
    assert cost.beside(fair.summary, "flops") == scored > 0
    assert 0 < seconds < fair.summary["round_seconds"]
    assert len(_told(fair.folder, "score_flops", of_clients=True)) == 4
    for result in (plain, fair):
        assert _agree(result, "flops") > 0
        assert _agree(result, "fit_seconds") > 0
        assert result.summary["evaluate_flops"] > 0
    assert plain.summary["evaluate_flops"] == fair.summary["evaluate_flops"]


def test_what_is_done_before_the_first_round_is_booked_there(tiny_folder: Path, tmp_path: Path) -> None:
    algorithm = {"name": "feddca", "centres": 2, "retrieve": 2}
    result = run(
        tiny_folder, tmp_path / "run", data={"public": 6, "source": {"rows_per_category": 8}}, algorithm=algorithm
    )
    whole, clients = (_told(result.folder, "embed_flops", of_clients=flag) for flag in (False, True))
    assert set(clients) == {(0, f"client-{i}") for i in (1, 2, 3)}
    assert whole[0, None] > sum(clients.values()) > 0  # the server has embedded its own rows
    assert result.summary["embed_flops"] == sum(whole.values())


def test_a_resumed_run_has_booked_the_same(tiny_folder: Path, tmp_path: Path) -> None:
    whole = run(tiny_folder, tmp_path / "whole", algorithm=FAIR, rounds=2)
    run(tiny_folder, tmp_path / "parts", algorithm=FAIR, rounds=1)
    parts = fedloom.resume(tmp_path / "parts", ["rounds=2"])
    assert _agree(parts, "score_flops") == whole.summary["score_flops"]


def test_books_of_before_these_costs_are_read(tiny_folder: Path, tmp_path: Path) -> None:
    run(tiny_folder, tmp_path / "run", rounds=1)
    (state,) = (tmp_path / "run" / "checkpoints").glob("*1/state.json")
    record = json.loads(state.read_text())
    for name in ("beside", "evaluate_flops", "peak_rss_bytes", "peak_device_bytes", "peak_of_process"):
        del record["totals"][name]
    state.write_text(json.dumps(record))
    fedloom.resume(tmp_path / "run", ["rounds=2"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    later = {"evaluate_flops", "peak_of", *cost.METRICS[2:]}
    assert cost.beside({key: value for key, value in summary.items() if key not in later}, "flops") is None
    (tmp_path / "run" / "summary.json").write_text(json.dumps({k: v for k, v in summary.items() if k not in later}))
    text = write_report(tmp_path / "run").read_text()
    assert "FLOPs of training" in text
    assert "start of the process" in text
