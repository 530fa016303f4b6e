"""Our figures against those of lm-evaluation-harness, and what its use must leave alone."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tests.evaluate.bare_view import BareView
from tests.helpers import run as run_recipe
from tests.tiny import stories_model, tiny_model, tiny_tokenizer

from fedloom import recipe as recipes
from fedloom.client.generate import Decoding, answers
from fedloom.client.likelihood import likelihoods
from fedloom.evaluate import extract
from fedloom.evaluate.lm_eval_bridge import LmEval, untouched
from fedloom.evaluate.mmlu import Mmlu
from fedloom.types import DataError, RecipeError

pytest.importorskip("lm_eval", reason="needs the extra eval: pip install 'fedloom[eval]'")

STRICT, FLEXIBLE = r"#### (\-?[0-9\.\,]+)", r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
IGNORED = [",", r"\$", r"(?s).*#### ", r"\.$"]
CHOICE = {
    "task": "our_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "right",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
FIRST = {"function": "take_first"}
TEXT = {
    "task": "our_text",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["Question:"], "do_sample": False, "max_gen_toks": 16},
    "filter_list": [
        {"name": "strict-match", "filter": [{"function": "regex", "regex_pattern": STRICT}, FIRST]},
        {
            "name": "flexible-extract",
            "filter": [{"function": "regex", "group_select": -1, "regex_pattern": FLEXIBLE}, FIRST],
        },
    ],
    "metric_list": [
        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "regexes_to_ignore": IGNORED}
    ],
}
OUTPUTS = [
    "#### $18.00", "#### 18.00", "#### 18.", "#### 1,000", "#### -5", "#### −5", "####18", "#### **18**", "#### 1/2",
    "#### 4 no, wait\n#### 9", "#### 9\n\nQuestion: And then?\n#### 7", "She has $18 left. (3 x 6)", "It costs 9 - 5",
    "#### 18 dollars in 7 days", "no number", "", "18", "18 apples", "1,800", "#### 1,800.", "$18.00", "...", "#### .",
    "-3", "#### -3.50", "It is 5. #### 6.", "$,", "THE ANSWER IS 4",
]  # fmt: skip
GOLDS = ["18", "-5", "1000", "1,800", "9", "0.5", "-3", "7", "5", "6", "4"]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of two task files on local data."""
    rows = [
        {
            "context": f"Question {i}: what is {i} times {j}?\nAnswer:",
            "choices": [" A", f" {i * j}", " no idea"],
            "right": 1,
        }
        for i in range(10)
        for j in range(5)
    ]
    (tmp_path / "choice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = [{"question": f"What is {i}?", "answer": f"#### {i}"} for i in range(6)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, texts)))
    for name, task in (("choice", CHOICE), ("text", TEXT)):
        files = {"data_files": {"test": str(tmp_path / f"{name}.jsonl")}}
        whole = {**task, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(whole))
    return tmp_path


def harness(model: Any, tokenizer: Any, batch: int = 1) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, device="cpu")


def asked(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]


def test_extraction_rules_agree_on_stored_outputs() -> None:
    from lm_eval.filters.extraction import RegexFilter

    strict, chain = RegexFilter(STRICT), RegexFilter(r"The answer is (\-?[0-9\.\,]+).")
    flexible = RegexFilter(FLEXIBLE, group_select=-1)
    for output in [*OUTPUTS, *(f"So. The answer is {g}.\n" for g in GOLDS)]:
        for ours, theirs in ((extract.strict, strict), (extract.flexible, flexible), (extract.strict_chain, chain)):
            [[raw]] = theirs.apply([[output]], [{}])
            own = ours(output)
            assert (own is None) == (raw == "[invalid]")
            assert own is None or own == extract._plain(raw)


def test_scores_agree_on_stored_outputs() -> None:
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.filters.extraction import RegexFilter

    filters = {
        "strict": RegexFilter(STRICT),
        "flexible": RegexFilter(FLEXIBLE, group_select=-1),
    }
    compared = 0
    for output in OUTPUTS:
        for gold in GOLDS:
            for name, theirs in filters.items():
                [[raw]] = theirs.apply([[output]], [{}])
                score = exact_match_fn(
                    predictions=[raw], references=[f"so\n#### {gold}"], regexes_to_ignore=IGNORED, ignore_case=True
                )
                assert bool(score["exact_match"]) == extract.RULES[name](output, f"so\n#### {gold}"), (output, gold)
                compared += 1
    assert compared == 2 * len(OUTPUTS) * len(GOLDS)


@pytest.mark.data
def test_log_likelihoods_agree_on_200_items(data_home: Path) -> None:
    model, tokenizer = stories_model(data_home)
    questions = Mmlu(limit=50, shots=0).questions("test", 0)
    pairs = [(q.context[-300:], choice) for q in questions for choice in q.choices]
    theirs = harness(model, tokenizer, batch=8).loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)
    ours = likelihoods(model, tokenizer, pairs)
    assert len(ours) == 200
    for one, (logprob, greedy) in zip(ours, theirs, strict=True):
        assert one.logprob == pytest.approx(logprob, abs=1e-4)
        assert one.greedy == greedy


@pytest.mark.data
def test_generated_texts_agree(data_home: Path) -> None:
    model, tokenizer = stories_model(data_home)
    names = ("Lily", "Tom", "Ben", "Sue", "Max")
    begins = (("Once upon a time,", "had"), ("One day,", "went"), ("Then", "said"), ("The friend of", "saw"))
    prompts = [f"{begin} {name} {verb}" for name in names for begin, verb in begins]
    arguments = [(one, {"until": ["\n\n", "The end"], "do_sample": False, "max_gen_toks": 24}) for one in prompts]
    theirs = harness(model, tokenizer).generate_until(asked("generate_until", arguments), disable_tqdm=True)
    ours = answers(model, tokenizer, prompts, 24, Decoding(stop=("\n\n", "The end"), batch_rows=1))
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= 19


def test_a_task_of_ones_own(tasks: Path) -> None:
    view = BareView(tiny_model(), tiny_tokenizer())
    found = LmEval(tasks=("our_choice", "our_text"), include=tasks, limit=20).evaluate(view)
    assert set(found.metrics) == {
        "mean", "our_choice/acc", "our_text/exact_match,strict-match", "our_text/exact_match,flexible-extract",
    }  # fmt: skip
    assert found.metrics["mean"] == pytest.approx(
        (found.metrics["our_choice/acc"] + found.metrics["our_text/exact_match,strict-match"]) / 2
    )
    assert len(found.samples) == 20 + 6  # an item once, whatever its filters
    assert found.samples[0][1].prompt == "Question 0: what is 0 times 0?\nAnswer:"
    assert found.settings["lm_eval"].startswith("0.4")
    hits = []
    for i in range(4):
        for j in range(5):
            pairs = [(f"Question {i}: what is {i} times {j}?\nAnswer:", c) for c in (" A", f" {i * j}", " no idea")]
            logs = [one.logprob for one in view.likelihoods(None, pairs)]
            hits.append(logs.index(max(logs)) == 1)
    assert found.metrics["our_choice/acc"] == pytest.approx(np.mean(hits))


def test_the_harness_sees_the_adapter_and_the_run_does_not_see_the_harness(
    tasks: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    evaluator = {"name": "lm_eval", "tasks": ["our_choice"], "include": str(tasks), "limit": 10, "every": 1}
    quiet = run_recipe(tiny_folder, tmp_path / "a", adapter={"dropout": 0.1}, trainer={"lr": 0.1}, evaluate=[])
    loud = run_recipe(tiny_folder, tmp_path / "b", adapter={"dropout": 0.1}, trainer={"lr": 0.1}, evaluate=[evaluator])
    assert quiet.summary["adapter_sha256"] == loud.summary["adapter_sha256"]
    rows = [json.loads(line) for line in (loud.folder / "samples" / "lm_eval.jsonl").read_text().splitlines()]
    outputs = {regime: [row["output"] for row in rows if row["regime"] == regime] for regime in ("base", "federated")}
    assert len(outputs["base"]) == len(outputs["federated"]) == 10
    assert all(a != b for a, b in zip(*outputs.values(), strict=True))
    assert loud.summary["best_round"] is None  # the items of the end choose no round


def test_leaves_modes_streams_and_log_alone() -> None:
    model = tiny_model().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    level = logging.getLogger("lm_eval").level
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), untouched(model):
        harness(model, tiny_tokenizer())
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == modes
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert logging.getLogger("lm_eval").level == level


def test_unknown_tasks_and_data_that_are_elsewhere(tasks: Path) -> None:
    view = BareView(tiny_model(), tiny_tokenizer())
    with pytest.raises(DataError, match="no task named 'our_choise'; did you mean 'our_choice'"):
        LmEval(tasks=("our_choise",), include=tasks).evaluate(view)
    (tasks / "choice.jsonl").unlink()
    found = LmEval(tasks=("our_choice", "our_text"), include=tasks, limit=2).evaluate(view)
    assert found.not_run.startswith("our_choice: its data cannot be had here")
    assert "our_text/exact_match,strict-match" in found.metrics


def test_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'fedloom\[eval\]'"):
        recipes.load({"evaluate": [{"name": "lm_eval", "tasks": ["arc_easy"]}]})


@pytest.mark.bundled
@pytest.mark.data
def test_log_likelihoods_of_the_bundled_model_agree() -> None:
    from fedloom.client.models import Model, load_model

    loaded = load_model(Model(name="smollm2-135m", dtype="fp32", device="cpu").resolved(), lambda text: None)
    questions = Mmlu(limit=10, shots=0).questions("test", 0)
    pairs = [(q.context, choice) for q in questions for choice in q.choices]
    wrapped = harness(loaded.model, loaded.tokenizer, batch=4)
    theirs = wrapped.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)
    for one, (logprob, greedy) in zip(likelihoods(loaded.model, loaded.tokenizer, pairs), theirs, strict=True):
        assert one.logprob == pytest.approx(logprob, abs=1e-4)
        assert one.greedy == greedy
