from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.evaluate.bare_view import BareView
from tests.tiny import tiny_model, tiny_tokenizer

from fedloom.client.generate import cut
from fedloom.evaluate import extract, mini
from fedloom.evaluate.bbh import Bbh
from fedloom.evaluate.gsm8k import Gsm8kAccuracy
from fedloom.evaluate.mini import Mini
from fedloom.evaluate.rouge import Rouge, rouge_l
from fedloom.types import DataError


class Saying(BareView):
    """A view whose model says given texts; they are cut as the real ones are."""

    said: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()

    def generate(self, params, prompts, max_new_tokens, decoding=None):  # type: ignore[no-untyped-def]
        self.asked += tuple(prompts)
        return [cut(text, decoding.stop if decoding else ()) for text in self.said[: len(prompts)]]


def view(*said: str) -> Saying:
    found = Saying(tiny_model(), tiny_tokenizer())
    found.said = said
    return found


def gsm8k_file(path: Path, count: int = 3) -> Path:
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is {i} + 1 = <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"}
            for i in range(count)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def naive_lcs(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    @lru_cache(None)
    def longest(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        if a[i] == b[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    return longest(0, 0)


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=12)


@given(WORDS, WORDS)
def test_rouge_l_equals_a_recursion(a: list[str], b: list[str]) -> None:
    lcs = naive_lcs(tuple(a), tuple(b))
    p, r = lcs / len(a), lcs / len(b)
    expected = 2 * p * r / (p + r) if lcs else 0.0
    assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("output", "reference"),
    [("The cat sat on the mat.", "the cat is on the mat"), ("A-b c", "a b, C!"), ("", "x"), ("?", "x"), ("x y", "y x")],
)
def test_rouge_l_equals_the_reference_package(output: str, reference: str) -> None:
    rouge_score = pytest.importorskip("rouge_score.rouge_scorer", reason="needs the extra eval")
    scorer = rouge_score.RougeScorer(["rougeL"])
    assert rouge_l(output, reference) == pytest.approx(scorer.score(reference, output)["rougeL"].fmeasure)


def test_rouge_takes_the_best_reference(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"instruction": "Say it", "input": "it", "output": ["x y", "a b"]},
            {"instruction": "Say", "instances": [{"input": "", "output": "c d"}]}]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)))
    seen = view("a b", "c")
    found = Rouge(path=file).evaluate(seen)
    assert found.metrics["rouge_l"] == pytest.approx((1 + 2 / 3) / 2)
    assert "Say it\n\nit" in seen.asked[0]
    file.write_text('{"instruction": "Say"}')
    with pytest.raises(DataError, match="the record 'Say' has no output to compare with"):
        Rouge(path=file).evaluate(seen)


def test_gsm8k_zero_shot_scores(tmp_path: Path) -> None:
    seen = view("#### 1 apples", "I do not know", "so it is $3.00")
    found = Gsm8kAccuracy(path=gsm8k_file(tmp_path / "g.jsonl")).evaluate(seen)
    assert found.metrics == {
        "strict": pytest.approx(1 / 3), "flexible": pytest.approx(1 / 3), "numeric": pytest.approx(2 / 3),
        "marked": pytest.approx(1 / 3), "unparseable": pytest.approx(1 / 3),
    }  # fmt: skip
    assert seen.asked[0] == "user: What is 0 + 1?\nassistant:"
    assert [one.extracted for _, one in found.samples] == ["1", None, "3"]


def test_gsm8k_with_worked_examples(tmp_path: Path) -> None:
    test, train = gsm8k_file(tmp_path / "test.jsonl"), gsm8k_file(tmp_path / "train.jsonl", 9)
    seen = view("It is 1. The answer is 1.\n\nQ: What is 9?", "The answer is 2 apples", "3")
    found = Gsm8kAccuracy(path=test, examples=train, shots=8).evaluate(seen)
    assert seen.asked[0].startswith("Q: What is 0 + 1?\nA: It is 0 + 1 = 1. The answer is 1.\n\nQ: What is 1 + 1?")
    assert seen.asked[0].count("The answer is") == 8
    assert seen.asked[0].endswith("\n\nQ: What is 0 + 1?\nA:")
    assert found.metrics["strict"] == pytest.approx(2 / 3)
    assert found.metrics["numeric"] == 1.0
    assert found.samples[0][1].output == "It is 1. The answer is 1.\n\n"
    with pytest.raises(DataError, match="9 worked examples for shots=10; set it lower"):
        Gsm8kAccuracy(path=test, examples=train, shots=10).evaluate(seen)


@pytest.mark.parametrize(
    ("output", "read"), [("The answer is 18.", "18"), ("The answer is 1,800.\n", "1800"), ("The answer is 18", "1")]
)
def test_strict_chain(output: str, read: str) -> None:
    assert extract.strict_chain(output) == read  # the rule wants one more character behind the number


def test_bbh_is_exact_match_by_task(tmp_path: Path) -> None:
    for name in ("logic", "sorting"):
        examples = [{"input": f"{name} {i}", "target": f"({i})"} for i in range(4)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"canary": "c", "examples": examples}))
    seen = view(" (2)\n\nQ: more", " (2) or so")
    found = Bbh(path=tmp_path, shots=2).evaluate(seen)
    assert found.metrics == {"exact_match": 0.5, "exact_match/logic": 0.5, "exact_match/sorting": 0.5}
    assert seen.asked[0] == "Q: logic 0\nA: (0)\n\nQ: logic 1\nA: (1)\n\nQ: logic 2\nA:"
    with pytest.raises(DataError, match="no task of BBH named 'sortin'; did you mean 'sorting'"):
        Bbh(path=tmp_path, tasks=("sortin",)).evaluate(seen)
    (tmp_path / "logic.json").write_text("[]")
    with pytest.raises(DataError, match=r"logic\.json: not a task of BIG-Bench Hard"):
        Bbh(path=tmp_path).evaluate(seen)


@pytest.mark.data
def test_mini_is_the_mean_of_its_members(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"mmlu": {"limit": 3, "shots": 0}, "bbh": {"limit": 1, "shots": 0, "max_new_tokens": 2}}
    parts = tuple(
        one.model_copy(update=small.get(one.part_name, {"limit": 1, "max_new_tokens": 2} if one.part_name == "gsm8k"
                       else {"limit": 2})) for one in mini.MEMBERS
    )  # fmt: skip
    monkeypatch.setattr(mini, "MEMBERS", parts)
    found = Mini().evaluate(BareView(tiny_model(), tiny_tokenizer()))
    names = {"mmlu", "truthfulqa", "pubmedqa", "bbh", "gsm8k"}
    assert set(found.metrics) == {"mean", *names} == {"mean", *found.settings}
    assert found.metrics["mean"] == pytest.approx(sum(found.metrics[name] for name in names) / 5)
    assert len(found.samples) == 3 + 2 + 2 + 14 + 1


def test_two_evaluations_give_identical_samples(tmp_path: Path) -> None:
    part = Gsm8kAccuracy(path=gsm8k_file(tmp_path / "g.jsonl"), max_new_tokens=8)
    first, second = (part.evaluate(BareView(tiny_model(), tiny_tokenizer())) for _ in range(2))
    assert list(first.samples) == list(second.samples)
