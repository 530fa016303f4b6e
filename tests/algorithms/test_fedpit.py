"""FedPIT: what the shared adapter learns from, what is dropped as a copy, and what stays at home."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.algorithms.by_hand import adapter, drive, ranks
from tests.algorithms.worlds import rounds, world
from tests.helpers import lines, run, same

from fedloom import slots
from fedloom.algorithms import Client
from fedloom.algorithms.fedpit import OWN, SYNTHETIC, FedPit, _read, _shown
from fedloom.algorithms.pairs import packed, unpacked
from fedloom.types import Bundle, Fit, Fitted, Generate, Memory, Message, Pair, Texts
from fedloom.world import World

MADE_UP = tuple(Pair(f"What comes after {word}?", f"Rather {word} again.") for word in ("red", "two", "May", "oak"))
PRIVATE = (Pair("Name the largest city of France.", "Paris"), Pair("How many legs has a spider?", "Eight of them."))


def _update(of: World, memory: Memory, name: str = "client-1") -> Any:
    state = of.recipe.algorithm.init(of.assets.initial)
    message = of.recipe.algorithm.broadcast(of.engine.stage.server, state, name)
    client = of.engine.client(name, 0, memory)
    return of.engine.drive(of.recipe.algorithm.train(client, message), name, 0)


def _other_rows(of: World, name: str, indices: np.ndarray) -> None:
    """Give a client other training rows."""
    data = of.engine.hands.clients[name]
    clients = {**of.engine.hands.clients, name: replace(data, train=indices)}
    of.engine.hands.clients = clients


def test_the_shared_adapter_never_sees_a_private_row(tiny_folder: Path, tmp_path: Path) -> None:
    """With the same made-up pairs the message is the same, bit for bit, whatever the private rows are."""
    memory = {SYNTHETIC: packed(MADE_UP, round=0.0)}
    sent, kept = [], []
    for other in (False, True):
        of = world(tiny_folder, tmp_path, algorithm="fedpit", data={"max_tokens": 2000})
        if other:
            _other_rows(of, "client-1", of.engine.hands.clients["client-2"].train)
        update, after = _update(of, memory)
        sent.append(update.message)
        kept.append(after)
    assert sent[0].groups.keys() == sent[1].groups.keys() == {"params"}
    assert same(dict(sent[0].groups["params"].tensors), dict(sent[1].groups["params"].tensors))
    assert sent[0].groups["params"].texts == {}
    assert any(float(t.abs().max()) > 0 for t in sent[0].groups["params"].tensors.values())
    assert not same(dict(kept[0][OWN].tensors), dict(kept[1][OWN].tensors))
    assert kept[0][SYNTHETIC] == kept[1][SYNTHETIC] == memory[SYNTHETIC]


def test_the_shared_adapter_learns_from_the_made_up_pairs(tiny_folder: Path, tmp_path: Path) -> None:
    of = world(tiny_folder, tmp_path, algorithm="fedpit", data={"max_tokens": 2000})
    sent = [_update(of, {SYNTHETIC: packed(pairs, round=0.0)})[0] for pairs in (MADE_UP, MADE_UP[::-1], ())]
    params = [dict(update.message.groups["params"].tensors) for update in sent]
    assert not same(params[0], params[1])
    assert all(float(t.abs().max()) == 0 for t in params[2].values())
    assert [update.metrics["synthetic"] for update in sent] == [4, 4, 0]
    assert sent[2].metrics["steps"] == 2  # of the local adapter alone
    assert sent[0].metrics["steps"] == 4
    assert [update.weight for update in sent] == [4, 4, 0]


def test_a_client_without_pairs_waters_nothing_down(tiny_folder: Path, tmp_path: Path) -> None:
    for weighting, weights in (("examples", [4.0, 0.0]), ("uniform", [1.0, 0.0])):
        knobs = {"name": "fedpit", "weighting": weighting}
        of = world(tiny_folder, tmp_path, algorithm=knobs, data={"max_tokens": 2000})
        sent = [_update(of, {SYNTHETIC: packed(pairs, round=0.0)})[0] for pairs in (MADE_UP, ())]
        assert [update.weight for update in sent] == weights
        algorithm, server = of.recipe.algorithm, of.engine.stage.server
        state = algorithm.init(of.assets.initial)
        for order in (sent, sent[::-1]):
            after = drive(algorithm.step(server, state, drive(algorithm.combine(server, state, order))))
            alone = drive(algorithm.step(server, state, drive(algorithm.combine(server, state, sent[:1]))))
            assert same(dict(after.params), dict(alone.params))
            assert not same(dict(after.params), dict(state.params))


def test_pairs_too_long_to_be_drawn_weigh_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    of = world(tiny_folder, tmp_path, algorithm="fedpit", data={"max_tokens": 200})
    endless = (Pair("Why? " * 100, "So. " * 100),)
    assert _update(of, {SYNTHETIC: packed(endless, round=0.0)})[0].weight == 0


def _client(memory: Memory, round_: int = 0) -> Client:
    start = adapter(2)
    return Client("a", round_, memory, len(PRIVATE), 1.0, start, lambda _: start, ranks(2))


def _written(
    algorithm: FedPit, client: Client, answers: Sequence[Sequence[str]]
) -> tuple[Memory, list[Fit], list[Generate]]:
    """Run one round in which the model writes `answers`, one batch after another."""
    steps, sent = algorithm.train(client, Message({"params": Bundle(client.initial)})), None
    fits: list[Fit] = []
    asked: list[Generate] = []
    try:
        while True:
            effect = steps.send(sent)
            if isinstance(effect, Fit):
                fits.append(effect)
                sent = Fitted(effect.start, 1, 0.1, 1, 1, (0.0,))
            elif isinstance(effect, Generate):
                sent = answers[len(asked)]
                asked.append(effect)
            else:
                assert isinstance(effect, Texts)
                sent = PRIVATE
    except StopIteration as stop:
        return stop.value[1], fits, asked


def test_copies_and_broken_pairs_are_dropped() -> None:
    first = [
        " What is a verb?\nResponse: A word that tells what is done.\n\nInstruction: And so on",
        " Name the largest city of France.\nResponse: Lyon",  # a question of its own
        " Name the largest town of France now.\nResponse: Paris",  # nearly
        " what is a verb\nResponse: Something else",  # an earlier one
        " no answer follows",
        " \nResponse: no question",
        " Is this one?\nResponse: ",
    ]
    second = [" Count to three.\nResponse: One, two, three."] * 2 + [" Which sea is salt?\nResponse: All."] * 5
    algorithm = FedPit(synthetic=7, shots=1)
    memory, fits, asked = _written(algorithm, _client({}), [first, second])
    kept = unpacked(memory[SYNTHETIC])
    assert [pair.question for pair in kept] == ["What is a verb?", "Count to three.", "Which sea is salt?"]
    assert kept[0].answer == "A word that tells what is done."
    assert len(asked) == 2
    assert asked[0].purpose != asked[1].purpose
    assert all(prompt in {_shown([one]) for one in PRIVATE} for prompt in asked[0].prompts)
    local, shared = fits
    assert local.rows is None
    assert local.pairs == shared.pairs == kept
    assert shared.rows is not None
    assert shared.rows.tolist() == [2, 3, 4]  # behind the two private ones
    assert {n for n in local.start if local.trainable is None or local.trainable(n)} == set(shared.start)
    assert slots.count(local.start) == 2


def test_pairs_are_made_once_or_renewed() -> None:
    algorithm = FedPit(synthetic=1)
    text = " What is a verb?\nResponse: A word."
    memory, _, _ = _written(algorithm, _client({}), [[text]])
    again, _, asked = _written(algorithm, _client(memory, 9), [])
    assert not asked
    assert again[SYNTHETIC] == memory[SYNTHETIC]
    renewing = FedPit(synthetic=1, renew=3)
    assert not _written(renewing, _client(memory, 2), [])[2]
    later, _, asked = _written(renewing, _client(memory, 3), [[" And a noun?\nResponse: A thing."]])
    assert len(asked) == 1
    assert unpacked(later[SYNTHETIC]) == (Pair("And a noun?", "A thing."),)
    assert later[SYNTHETIC].scalars["round"] == 3


def test_what_is_shown_can_be_read_back() -> None:
    (first,) = _read([_shown(PRIVATE).removeprefix("Instruction:")])
    assert first == PRIVATE[0]
    assert unpacked(packed(PRIVATE, round=4.0)) == PRIVATE
    assert unpacked(Bundle()) == ()


def test_the_tiny_model_writes_from_its_clients_rows(tiny_folder: Path, tmp_path: Path) -> None:
    """It writes nothing that is a pair, and says so; nobody's change is then anything but zero."""
    knobs = {"name": "fedpit", "synthetic": 2, "attempts": 1, "max_new_tokens": 4}
    of = world(tiny_folder, tmp_path, algorithm=knobs, data={"max_tokens": 2000})
    state = rounds(of, [()])
    assert same(dict(state.params), dict(of.assets.initial))
    for name in of.clients:
        memory = of.memories.load(name)
        assert unpacked(memory[SYNTHETIC]) == ()
        own = of.engine.at_client(state, name, of.recipe.algorithm.own)
        assert same(slots.slot(own, 1), dict(state.params))
        assert any(float(t.abs().max()) > 0 for n, t in slots.main(own).items() if n.endswith("lora_B"))


def test_a_finished_run_is_saved_and_measured(tiny_folder: Path, tmp_path: Path) -> None:
    knobs = {"name": "fedpit", "synthetic": 2, "attempts": 1, "max_new_tokens": 4}
    result = run(tiny_folder, tmp_path / "a", algorithm=knobs, data={"unseen": 0.34}, adapt_steps=1)
    # nobody kept a pair, so that there is no mean to compare with
    assert not [one for one in lines(result.folder / "metrics.jsonl") if one["name"] == "aggregation_error"]
    assert {"federated", "unseen adapted"} <= set(result.metrics)
    assert all(
        (one / "personal" / "adapter_model.safetensors").is_file() for one in (result.folder / "adapters").iterdir()
    )


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_writing_is_a_function_of_seed_round_and_client(tiny_folder: Path, tmp_path: Path, temperature: float) -> None:
    of = world(tiny_folder, tmp_path)
    ask = Generate(of.assets.initial, ["a", "a"], 6, temperature=temperature, purpose="synthetic:0")
    told = [of.engine.hands.perform({0: ask}, [name], round_)[0] for name, round_ in (("client-1", 0),) * 2]
    assert told[0] == told[1]
    other = of.engine.hands.perform({0: ask}, ["client-2"], 0)[0]
    assert (other == told[0]) == (temperature == 0)
    assert torch.equal(_client({}).stream("shots", 1).get_state(), _client({}).stream("shots", 1).get_state())
