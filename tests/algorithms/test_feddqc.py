"""FedDQC: FedAvg where nothing is left out, scores as they are defined, and the rows of every stage."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.algorithms.by_hand import drive
from tests.helpers import adapter, lines, run, same, tree
from tests.tiny import stories_model, tiny_model
from torch.nn import functional

import fedloom
from fedloom import recipe as recipes
from fedloom.algorithms.feddqc import FedDqc, alignment
from fedloom.assets import prepare
from fedloom.checkpoint import MemoryStore
from fedloom.tracking import Sink
from fedloom.types import Bundle, Losses, Pair, RecipeError, Texts
from fedloom.world import World

ALL = {"name": "feddqc", "stages": 1}


def _world(folder: Path, out: Path, **changes: Any) -> World:
    recipe = recipes.load(tree(folder, **changes)).resolved()
    return World(recipe, out, prepare(recipe, Sink()), Sink())


# neutral settings


@pytest.mark.parametrize(("weighting", "knobs"), [("examples", {}), ("uniform", {"threshold": -1e9})])
def test_all_rows_in_one_stage_are_fedavg_bit_for_bit(
    tiny_folder: Path, tmp_path: Path, weighting: str, knobs: dict[str, float]
) -> None:
    data = {"partition": {"name": "quantity", "exponent": 1.0}}
    plain = run(tiny_folder, tmp_path / "a", data=data, algorithm={"name": "fedavg", "weighting": weighting})
    staged = run(tiny_folder, tmp_path / "b", data=data, algorithm={**ALL, **knobs, "weighting": weighting})
    assert same(adapter(plain), adapter(staged))
    assert plain.summary["bytes_up"] == staged.summary["bytes_up"]
    assert plain.summary["bytes_down"] == staged.summary["bytes_down"]


def test_leaving_rows_out_is_not_fedavg(tiny_folder: Path, tmp_path: Path) -> None:
    plain = run(tiny_folder, tmp_path / "a")
    assert not same(adapter(plain), adapter(run(tiny_folder, tmp_path / "b", algorithm={**ALL, "keep": 0.5})))


# scores


def test_scores_are_the_difference_of_two_losses(tiny_folder: Path, tmp_path: Path) -> None:
    """Against the plain model, row by row: the same text with and without the question."""
    world = _world(tiny_folder, tmp_path, model={"dtype": "fp64"}, data={"system": "Be brief."})
    engine, plain = world.engine, tiny_model(torch.float64)
    found = engine.drive(alignment(world.assets.initial), "client-1", 0)
    tokenizer = engine.stage.desk.tokenizer
    pairs = engine.hands.desk.pairs(engine.hands.rows("client-1", "train").indices)
    assert len(pairs) == len(found) > 1
    for pair, score in zip(pairs, found.tolist(), strict=True):
        losses = []
        for question in ("", pair.question):
            prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
            prompt += f"{question}<|im_end|>\n<|im_start|>assistant\n"
            before, after = (tokenizer(text)["input_ids"] for text in (prompt, pair.answer + "<|im_end|>"))
            with torch.no_grad():
                logits = plain(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
            losses.append(float(functional.cross_entropy(logits, torch.tensor(after))))
        assert score == pytest.approx(losses[0] - losses[1], abs=1e-6)


def test_the_order_of_rows_is_irrelevant() -> None:
    """Scores move with their rows, and so do the rows that are kept."""
    pairs = [Pair(f"question {i}", f"answer {i}") for i in range(7)]
    order = [3, 0, 6, 2, 5, 1, 4]
    straight, turned = _scored(pairs), _scored([pairs[i] for i in order])
    assert turned.tolist() == [straight.tolist()[i] for i in order]
    algorithm = FedDqc(keep=0.6, stages=2)
    for stage in (0, 1):
        rows = {pairs[i] for i in algorithm.part(algorithm.kept(straight), stage).tolist()}
        assert rows == {pairs[order[i]] for i in algorithm.part(algorithm.kept(turned), stage).tolist()}


def _scored(pairs: list[Pair]) -> torch.Tensor:
    def answer(effect: Any) -> Any:
        if isinstance(effect, Texts):
            return pairs
        assert isinstance(effect, Losses)
        nll = [float(hash((p.question, p.answer)) % 1000) if p.question else 1000.0 for p in effect.pairs]
        return Bundle({"nll": torch.tensor(nll).double(), "tokens": torch.full((len(nll),), 2.0).double()})

    return drive(alignment({}), answer)


def test_rows_without_a_loss_come_last() -> None:
    def answer(effect: Any) -> Any:
        if isinstance(effect, Texts):
            return [Pair("q", "a")] * 3
        nll = torch.tensor([1.0, math.nan, 2.0] if effect.pairs[0].question else [4.0, math.nan, 4.0]).double()
        return Bundle({"nll": nll, "tokens": torch.tensor([1.0, 0.0, 1.0]).double()})

    assert drive(alignment({}), answer).tolist() == [3.0, -math.inf, 2.0]


@pytest.mark.data
def test_shuffled_answers_have_lower_scores(tmp_path: Path, data_home: Path) -> None:
    """On a model that can read: stories whose continuation is that of another story fit less."""
    model, tokenizer = stories_model(data_home)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    begins = [
        "Once upon a time, there was a little girl named Lily. She had a red",
        "Tom had a big dog. The dog liked to",
        "One day, a boy named Ben saw a bird in a tree. The bird was",
        "Mom said it was time to go to bed. Sam was",
    ]
    ends = _continued(model, tokenizer, begins)
    means = []
    for answers in (ends, ends[1:] + ends[:1]):
        rows = [{"instruction": q, "output": a} for q, a in zip(begins, answers, strict=True)]
        means.append(float(_means(tmp_path, rows).mean()))
    assert means[0] > means[1] + 0.1


def _continued(model: Any, tokenizer: Any, begins: list[str]) -> list[str]:
    from fedloom.client.generate import answers

    return [" ".join(text.split()) for text in answers(model, tokenizer, ["<s>" + one for one in begins], 24)]


def _means(folder: Path, rows: list[dict[str, str]]) -> torch.Tensor:
    path = folder / f"rows-{abs(hash(rows[0]['output']))}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = {"source": str(path), "clients": 1, "partition": "iid"}
    data |= {"template": "plain", "splits": {"train": 1, "validation": 0, "test": 0}}
    recipe = recipes.load({**tree(folder / "model"), "data": data}).resolved()
    world = World(recipe, folder, prepare(recipe, Sink()), Sink())
    found: torch.Tensor = world.engine.drive(alignment(world.assets.initial), "client-1", 0)
    return found


# rows and stages


def test_stages_go_from_high_to_low_and_hold_every_row_once() -> None:
    scores = torch.tensor([0.3, 0.9, -0.2, 0.5, 0.1, 0.7, 0.4]).double()
    algorithm = FedDqc(stages=3)
    kept = algorithm.kept(scores)
    assert kept == [1, 5, 3, 6, 0, 4, 2]
    parts = [algorithm.part(kept, stage).tolist() for stage in range(3)]
    assert parts == [[1, 5], [3, 6], [0, 2, 4]]
    assert sorted(itertools.chain(*parts)) == list(range(7))


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({"keep": 0.5}, [1, 0]),
        ({"keep": 0.51}, [1, 0, 3]),
        ({"threshold": 0.2}, [1, 0]),
        ({"threshold": 0.3, "keep": 0.75}, [1, 0]),
        ({"threshold": 5.0}, [1]),
        ({"keep": 0.01}, [1]),
    ],
)
def test_what_is_kept(knobs: dict[str, float], expected: list[int]) -> None:
    assert FedDqc(**knobs).kept(torch.tensor([0.3, 0.9, -0.2, 0.1]).double()) == expected


def test_more_stages_than_rows_leave_no_stage_empty() -> None:
    algorithm = FedDqc(stages=5)
    assert [algorithm.part([1, 0], stage).tolist() for stage in range(5)] == [[1], [1], [1], [0], [0]]


def test_rounds_of_stages() -> None:
    algorithm = FedDqc(stages=3, stage_rounds=2)
    assert [algorithm.stage(round_) for round_ in range(8)] == [0, 0, 1, 1, 2, 2, 2, 2]


def test_rows_are_scored_once_a_stage(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedloom.algorithms import feddqc

    asked = []
    real = feddqc.alignment
    monkeypatch.setattr(feddqc, "alignment", lambda params: asked.append(1) or real(params))
    result = run(
        tiny_folder,
        tmp_path / "r",
        rounds=4,
        algorithm={"name": "feddqc", "stages": 2, "stage_rounds": 2},
        evaluate=[],
    )
    assert len(asked) == 2 * 3
    kept = MemoryStore(result.folder / "memories")
    kept.restore(4)
    assert kept.load("client-2")["quality"].scalars == {"stage": 1.0}
    told = [one for one in lines(result.folder / "metrics.jsonl") if one["name"] == "kept"]
    assert {one["value"] for one in told} == {3.0}


def test_resumed_is_straight(tiny_folder: Path, tmp_path: Path) -> None:
    algorithm = {"name": "feddqc", "stages": 2, "stage_rounds": 1}
    straight = run(tiny_folder, tmp_path / "a", rounds=3, algorithm=algorithm)
    run(tiny_folder, tmp_path / "b", rounds=2, algorithm=algorithm)
    assert same(adapter(straight), adapter(fedloom.resume(tmp_path / "b", ["rounds=3"])))


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({"keep": 0}, "greater than 0"),
        ({"keep": 1.2}, "less than or equal to 1"),
        ({"stages": 0}, "greater than 0"),
        ({"threshold": math.inf}, "finite number"),
        ({"stage_rounds": 0}, "greater than 0"),
    ],
)
def test_bad_settings(algorithm: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.load({"algorithm": {"name": "feddqc", **algorithm}, "rounds": 5})
