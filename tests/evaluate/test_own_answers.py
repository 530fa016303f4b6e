"""Clients' own rows answered with their own adapters: the right adapter, the right rows, and sums alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.bare_view import BareView
from tests.helpers import lines, run
from tests.tiny import tiny_model, tiny_tokenizer

from fedloom import recipe as recipes
from fedloom.evaluate.own_answers import OwnAnswers
from fedloom.report import read
from fedloom.report.parts import tone
from fedloom.results import REGIMES
from fedloom.types import Pair, RecipeError

ROWS = {
    "ann": [Pair("1?", "one"), Pair("2?", "two"), Pair("3?", "three")],
    "bob": [Pair("4?", "four")],
}


class Answering(BareView):
    """A view of two clients whose adapters are their names, and whose answers are given."""

    shared = False
    said: Mapping[str, str]
    asked: list[tuple[Any, int]]

    @property
    def adapters(self) -> Mapping[str | None, Any]:
        return {None: "all"} if self.shared else {"ann": "ann's", "bob": "bob's"}

    def own_rows(self) -> Mapping[str, Sequence[Pair]]:
        return ROWS

    def generate(self, params: Any, prompts: Sequence[str], max_new_tokens: int, decoding: Any = None) -> list[str]:
        self.asked.append((params, len(prompts)))
        return [self.said[prompt.split()[1]] for prompt in prompts]


def _view(said: Mapping[str, str], shared: bool = False) -> Answering:
    found = Answering(tiny_model(), tiny_tokenizer())
    found.said, found.shared, found.asked = said, shared, []
    return found


SAID = {"1?": "one", "2?": "It is two.", "3?": "four", "4?": "four."}


def test_sums_over_rows_and_clients() -> None:
    found = OwnAnswers().evaluate(_view(SAID))
    assert found.clients == {
        # "It is two." holds one of one words among its three
        "ann": {"exact_match": 1 / 3, "contained": 2 / 3, "rouge_l": (1 + 2 / 4 + 0) / 3},
        "bob": {"exact_match": 1.0, "contained": 1.0, "rouge_l": 1.0},
    }
    assert found.metrics == {"exact_match": 2 / 4, "contained": 3 / 4, "rouge_l": (1.5 + 1) / 4}
    assert found.weights == {"ann": 3.0, "bob": 1.0}
    assert not found.samples


@pytest.mark.parametrize("shared", [False, True])
def test_each_row_is_answered_with_its_clients_adapter(shared: bool) -> None:
    view = _view(SAID, shared)
    OwnAnswers().evaluate(view)
    assert view.asked == ([("all", 3), ("all", 1)] if shared else [("ann's", 3), ("bob's", 1)])


def test_a_limit_takes_the_first_rows() -> None:
    view = _view(SAID)
    assert OwnAnswers(limit=1).evaluate(view).clients["ann"] == {"exact_match": 1.0, "contained": 1.0, "rouge_l": 1.0}
    assert view.asked == [("ann's", 1), ("bob's", 1)]


def test_without_rows_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answering, "own_rows", lambda self: {})
    assert OwnAnswers().evaluate(_view(SAID)).not_run == "no client has rows of its own in test; raise data.splits"


@pytest.mark.parametrize("algorithm", ["fedavg", "fedsa-lora"])
def test_every_regime_of_a_run(tiny_folder: Path, tmp_path: Path, algorithm: str) -> None:
    result = run(
        tiny_folder,
        tmp_path / "r",
        algorithm=algorithm,
        data={"unseen": 0.34, "clients": 3, "partition": "iid"},
        evaluate=[{"name": "own-answers", "limit": 1, "max_new_tokens": 3}],
        compare=["local"],
        adapt_steps=1,
        rounds=1,
    )
    regimes = {"base", "federated", "federated adapted", "unseen", "unseen adapted", "local"}
    assert regimes <= set(result.metrics)
    assert all({"exact_match", "contained"} <= set(result.metrics[one]["own-answers"]) for one in regimes)
    split = json.loads((tmp_path / "r" / "split.json").read_text())
    kept = {
        line["client"] for line in lines(tmp_path / "r" / "metrics.jsonl") if "/unseen/own-answers/" in line["name"]
    }
    trained = {line["client"] for line in lines(tmp_path / "r" / "metrics.jsonl") if "/federated/own-" in line["name"]}
    assert len(kept - {None}) == 1
    assert kept & trained == {None}
    assert (kept | trained) - {None} == set(split) - {"hash"}
    # rows are private: no answer is written down
    assert not (tmp_path / "r" / "samples" / "own-answers.jsonl").exists()
    assert read.read(tmp_path / "r").own == "federated"


def test_regimes_are_shown_in_a_fixed_order_and_apart() -> None:
    shown = [name for name in REGIMES if name in ("unseen adapted", "federated adapted", "unseen", "federated")]
    assert shown == ["federated", "federated adapted", "unseen", "unseen adapted"]
    drawn = ("base", "local", "federated", "centralized", "unseen", "federated adapted", "unseen adapted")
    assert len({tone(name) for name in drawn}) == len(drawn)


@pytest.mark.parametrize(
    ("knob", "message"), [({"limit": 0}, "greater than 0"), ({"max_new_tokens": 0}, "greater than 0")]
)
def test_bad_settings(knob: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.load({"evaluate": [{"name": "own-answers", **knob}]})
