"""The law of scores: over one adapter, the mean over strata of the mean over items of an item's scores is the primary
metric, for every evaluator that keeps samples."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.evaluate.bare_view import BareView
from tests.evaluate.test_choice import mmlu_folder, truthful
from tests.evaluate.test_judge import endpoint, judge
from tests.tiny import tiny_model, tiny_tokenizer

from fedloom.client.generate import GREEDY, Decoding
from fedloom.client.likelihood import Likelihood
from fedloom.evaluate import Evaluation, Evaluator, mini
from fedloom.evaluate.bbh import Bbh
from fedloom.evaluate.code.base import Attempt, Task, Tasks
from fedloom.evaluate.code.humaneval import HumanEval
from fedloom.evaluate.code.humaneval_x import HumanEvalX
from fedloom.evaluate.code.judging import Verdict
from fedloom.evaluate.code.languages import LANGUAGES, Problem
from fedloom.evaluate.code.mbpp import Mbpp
from fedloom.evaluate.code_match import CodeMatch
from fedloom.evaluate.gsm8k import Gsm8kAccuracy
from fedloom.evaluate.mini import Mini
from fedloom.evaluate.mmlu import Mmlu
from fedloom.evaluate.pubmedqa import PubMedQa
from fedloom.evaluate.rouge import Rouge
from fedloom.evaluate.sandbox import Unconfined
from fedloom.evaluate.scored import answered, items, primary
from fedloom.evaluate.tasks import TaskSuite
from fedloom.evaluate.truthfulqa import TruthfulQa
from fedloom.types import Tensors

SUMS_ALONE = {"loss", "own-answers"}
"""Evaluators that keep no samples, as rows are private."""


def chance(*what: object) -> float:
    """Return a number from 0 to 1 that depends on nothing else."""
    return zlib.crc32(repr(what).encode()) / 2**32


@dataclass
class Guessing(BareView):
    """A view of two personal adapters whose likelihoods are chance and whose answers are given."""

    base: object = None  # type: ignore[assignment]
    tokenizer: object = None  # type: ignore[assignment]
    said: Callable[[object, str], str] = lambda who, prompt: ""

    @property
    def adapters(self) -> dict[str, str]:  # type: ignore[override]
        return {"ann": "ann", "bob": "bob"}

    def generate(
        self, params: Tensors | None, prompts: Sequence[str], max_new_tokens: int, decoding: Decoding = GREEDY
    ) -> list[str]:
        return [self.said(params, prompt) for prompt in prompts]

    def likelihoods(self, params: Tensors | None, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        return [Likelihood(-9 * chance(params, *pair), 1, False) for pair in pairs]


def holds(evaluator: type[Evaluator] | Evaluator, found: Evaluation) -> None:
    """Assert the law for each adapter, on scores that are not all alike."""
    by_adapter = found.clients or {None: found.metrics}
    assert len({one.score for _, one in found.samples}) > 1
    for client, metrics in by_adapter.items():
        every = items(answered(one for who, one in found.samples if who == client))
        # by hand, as the law is worded
        strata: dict[str, list[float]] = {}
        for one in every.values():
            strata.setdefault(one.stratum, []).append(one.score)
        assert np.mean([np.mean(scores) for scores in strata.values()]) == pytest.approx(metrics[evaluator.primary])
        assert primary(every) == pytest.approx(metrics[evaluator.primary])
    assert found.metrics[evaluator.primary] == pytest.approx(
        np.mean([one[evaluator.primary] for one in by_adapter.values()])
    )


def bbh_folder(path: Path) -> Path:
    """Two tasks, one of which has few problems."""
    for name, count in (("long", 9), ("short", 3)):
        examples = [{"input": f"{name} {i}?", "target": "ab"[i % 2]} for i in range(count)]
        (path / f"{name}.json").write_text(json.dumps({"examples": examples}))
    return path


def pubmed_folder(path: Path) -> Path:
    (path / "ori_pqal.json").write_text(
        json.dumps({str(i): {"QUESTION": f"Is it {i}?", "CONTEXTS": ["So."]} for i in range(9)})
    )
    (path / "test_ground_truth.json").write_text(json.dumps({str(i): ("yes", "no", "maybe")[i % 3] for i in range(9)}))
    return path


def gsm8k_file(path: Path) -> Path:
    path.write_text("\n".join(json.dumps({"question": f"{i}?", "answer": f"So.\n#### {i % 2}"}) for i in range(5)))
    return path


def rouge_file(path: Path) -> Path:
    path.write_text("\n".join(json.dumps({"instruction": f"Say {i}.", "output": f"a b {i}"}) for i in range(5)))
    return path


def match_file(path: Path) -> Path:
    path.write_text(json.dumps([{"doc": f"add {i}", "code": "f", "label": i % 2} for i in range(6)]))
    return path


def members(folder: Path) -> tuple[Evaluator, ...]:
    return (
        Mmlu(path=mmlu_folder(folder), limit=None, shots=0),
        TruthfulQa(path=truthful(folder / "t.csv")),
        PubMedQa(path=pubmed_folder(folder)),
        Bbh(path=bbh_folder(made(folder / "bbh")), limit=None, shots=1),
        Gsm8kAccuracy(path=gsm8k_file(folder / "g.jsonl")),
    )


def made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def guess(who: object, prompt: str) -> str:
    """Return an answer that is right now and then, whatever is asked."""
    return "ab"[chance(who, prompt) > 0.5] if "Q: " in prompt else "01"[chance(who, prompt) > 0.5]


OFFLINE: dict[str, Callable[[Path], Evaluator]] = {
    "mmlu": lambda folder: members(folder)[0],
    "truthfulqa": lambda folder: members(folder)[1],
    "pubmedqa": lambda folder: members(folder)[2],
    "bbh": lambda folder: members(folder)[3],
    "gsm8k": lambda folder: members(folder)[4],
    "mini": lambda folder: Mini(),
    "code_match": lambda folder: CodeMatch(path=match_file(folder / "pairs.json")),
    "rouge": lambda folder: Rouge(path=rouge_file(folder / "rows.jsonl")),
}


@pytest.mark.parametrize("name", OFFLINE)
def test_scores_make_the_primary_metric(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "mini":
        monkeypatch.setattr(mini, "MEMBERS", members(tmp_path))
    part = OFFLINE[name](tmp_path)
    holds(part, part.evaluate(Guessing(said=guess)))


def test_scores_of_the_task_suite() -> None:
    part = TaskSuite(items_per_category=3, categories=("units", "sorting"))
    answers = {item.prompt: item.answer for item in part.items("test", 0)}

    def said(who: object, prompt: str) -> str:
        right = next(answer for question, answer in answers.items() if question in prompt)
        return right if chance(who, prompt) > 0.5 else "no"

    holds(part, part.evaluate(Guessing(said=said)))


def test_scores_of_ratings_some_of_which_are_missing(tmp_path: Path) -> None:
    with endpoint(lambda i, body: (400, "") if i == 1 else (200, f"[[{i + 3}]]")) as (url, _):
        part = judge(tmp_path, url)
        holds(part, part.evaluate(BareView(tiny_model(), tiny_tokenizer())))


@pytest.mark.parametrize("kind", [HumanEval, Mbpp, HumanEvalX])
def test_scores_of_programs_in_several_samples_and_languages(kind: type[HumanEval]) -> None:
    counts = {"python": 4, "js": 2} if kind is HumanEvalX else {"python": 4}
    tasks = [
        Task(f"{language}/{i}", LANGUAGES[language], Problem(str(i), "", "", "f", "", "", ""), "")
        for language, count in counts.items()
        for i in range(count)
    ]
    attempts = {
        client: [
            Attempt(task, "", "", "", Verdict(float(chance(client, task.id, i) > 0.4), ""))
            for task in tasks
            for i in range(3)
        ]
        for client in ("ann", "bob")
    }
    part = kind(samples=3, temperature=0.5, k=(1, 2))
    holds(part, part.told(Tasks(tasks), attempts, Unconfined()))


def test_scores_of_the_harness(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval: pip install 'fedloom[eval]'")
    from fedloom.evaluate.lm_eval_bridge import LmEval

    part = LmEval(tasks=("law_group", "law_tag", "law_c"), include=harness_folder(tmp_path), limit=None)
    found = part.evaluate(BareView(tiny_model(), tiny_tokenizer()))
    holds(part, found)
    assert {one.stratum for _, one in found.samples} == {"law_group", "law_d", "law_e", "law_c"}
    part = LmEval(tasks=("law_c", "law_corpus"), include=tmp_path)
    found = part.evaluate(BareView(tiny_model(), tiny_tokenizer()))
    assert found.not_run == ""
    assert {one.score for _, one in found.samples} == {None}  # F1 is of the whole, so nothing may pass for its parts
    assert "law_corpus is no mean over items" in found.samples[0][1].verdict


def harness_folder(path: Path) -> Path:
    """Six tasks of unlike size: two in a group with a metric, two under a tag, one alone, one of a corpus metric."""
    accuracy = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    corpus = {"metric": "f1", "aggregation": "f1", "higher_is_better": True}
    for name, count in (("a", 3), ("b", 9), ("c", 5), ("d", 4), ("e", 8), ("corpus", 7)):
        choices = [" x", " yy"] if name == "corpus" else [" x", " yy", " z"]  # the harness's F1 is of two classes
        rows = [{"context": f"{name} {i}?", "choices": choices, "right": i % len(choices)} for i in range(count)]
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        task = {
            "task": f"law_{name}",
            **({"tag": "law_tag"} if name in "de" else {}),
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path / f"{name}.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "right",
            "metric_list": [corpus if name == "corpus" else accuracy],
        }
        (path / f"{name}.yaml").write_text(yaml.safe_dump(task))
    weighted = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    group = {"group": "law_group", "task": ["law_a", "law_b"], "aggregate_metric_list": [weighted]}
    (path / "group.yaml").write_text(yaml.safe_dump(group))
    return path


def test_no_evaluator_is_left_out() -> None:
    programs, others = {"humaneval", "mbpp", "humaneval-x"}, {"tasks", "judge", "lm_eval"}
    assert set(OFFLINE) | programs | others | SUMS_ALONE == set(Evaluator.known)
