"""What is refused before the first round, since it would fail in a run's course, and intervals in that course."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.evaluate.bare_view import BareView
from tests.evaluate.problem_file import problem_file
from tests.evaluate.test_choice import mmlu_folder, truthful
from tests.evaluate.test_judge import judge
from tests.helpers import lines, run
from tests.laws.test_primary_metric import bbh_folder, gsm8k_file, made, match_file, members, pubmed_folder, rouge_file

from fedloom.evaluate import Evaluation, Evaluator, Sample, mini
from fedloom.evaluate.bbh import Bbh
from fedloom.evaluate.code.humaneval import HumanEval
from fedloom.evaluate.code_match import CodeMatch
from fedloom.evaluate.gsm8k import Gsm8kAccuracy
from fedloom.evaluate.loss import Loss
from fedloom.evaluate.mini import Mini
from fedloom.evaluate.mmlu import Mmlu
from fedloom.evaluate.own_answers import OwnAnswers
from fedloom.evaluate.pubmedqa import PubMedQa
from fedloom.evaluate.rouge import Rouge
from fedloom.evaluate.stats import client_bootstrap
from fedloom.evaluate.tasks import TaskSuite
from fedloom.evaluate.truthfulqa import TruthfulQa
from fedloom.evaluate.view import interval
from fedloom.types import Bundle, DataError

ALL_AT_THE_END: dict[str, Callable[[Path], Evaluator]] = {
    "mmlu": lambda folder: Mmlu(path=mmlu_folder(folder), limit=None),
    "truthfulqa": lambda folder: TruthfulQa(path=truthful(folder / "t.csv"), limit=None),
    "pubmedqa": lambda folder: PubMedQa(path=pubmed_folder(folder), limit=None),
    "bbh": lambda folder: Bbh(path=bbh_folder(made(folder / "bbh")), limit=None),
    "gsm8k": lambda folder: Gsm8kAccuracy(path=gsm8k_file(folder / "g.jsonl"), limit=None),
    "code_match": lambda folder: CodeMatch(path=match_file(folder / "pairs.json"), limit=None),
    "rouge": lambda folder: Rouge(path=rouge_file(folder / "rows.jsonl"), limit=None),
    "judge": lambda folder: judge(folder, "http://127.0.0.1:9/v1"),
    "humaneval": lambda folder: HumanEval(path=problem_file(folder)),
    "mini": lambda folder: Mini(),
}


@pytest.mark.parametrize("name", ALL_AT_THE_END)
def test_items_that_are_all_kept_for_the_end_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mini, "MEMBERS", members(tmp_path))
    part = ALL_AT_THE_END[name](tmp_path)
    with pytest.raises(DataError, match=r"are kept for the end.*set limit to at most \d+, or every: 0"):
        part.check(0)


def test_some_left_are_enough(tmp_path: Path) -> None:
    HumanEval(path=problem_file(tmp_path), limit=3).check(0)
    TaskSuite().check(0)
    Loss().check(0)


def test_a_run_is_refused_before_it_trains(tiny_folder: Path, tmp_path: Path) -> None:
    code: dict[str, Any] = {"name": "humaneval", "path": str(problem_file(tmp_path)), "every": 2}
    with pytest.raises(DataError, match=r"humaneval: all 6 problems are kept for the end.*`every: 2`"):
        run(tiny_folder, tmp_path / "run", evaluate=[code], rounds=2)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_loss_without_any_row_is_not_run() -> None:
    found = Loss().evaluate(BareView(None, None, "validation"))  # type: ignore[arg-type]
    assert found.metrics == {}
    assert found.not_run == "no client has rows of its own in validation; raise data.splits"


def test_intervals_hold_the_metric_they_are_named_after() -> None:
    """Macro means and graded scores get a bootstrap of themselves, not an interval of something beside them."""
    many = [(None, Sample(f"a{i}", "", "", None, "", float(i % 10 == 0), stratum="a")) for i in range(40)]
    few = [(None, Sample(f"b{i}", "", "", None, "", float(i != 0), stratum="b")) for i in range(5)]
    macro = (4 / 40 + 4 / 5) / 2  # of all items it is 8 / 45
    ends = interval(Bbh(), Evaluation({"exact_match": macro}, samples=many + few))
    assert 8 / 45 < ends["exact_match_low"] < macro < ends["exact_match_high"]
    graded = [(None, Sample(f"q{i}", "", "", None, "", 0.4 + 0.01 * (i % 20))) for i in range(60)]
    mean = float(np.mean([one.score for _, one in graded if one.score is not None]))
    ends = interval(TruthfulQa(), Evaluation({"mc2": mean}, samples=graded))
    assert mean - 0.03 < ends["mc2_low"] < mean < ends["mc2_high"] < mean + 0.03


def test_an_interval_that_cannot_be_told_is_not() -> None:
    alike = [(None, Sample(f"{s}{i}", "", "", None, "", 0.0, stratum=s)) for s in "ab" for i in range(9)]
    assert interval(Bbh(), Evaluation({"exact_match": 0.0}, samples=alike)) == {}  # not from 0 to 0
    single = [*alike, (None, Sample("c", "", "", None, "", 1.0, stratum="c"))]
    assert interval(Bbh(), Evaluation({"exact_match": 1 / 3}, samples=single)) == {}


def test_clients_that_are_measured_apart_give_the_interval() -> None:
    sums = {f"c{i}": Bundle({}, {"nll": 2.0 * i * (i + 1), "tokens": i + 1.0, "bytes": 9.0, "examples": 1.0}, {})
            for i in range(8)}  # fmt: skip

    class Sums(BareView):
        def losses(self) -> dict[str, Bundle]:
            return sums

    found = Loss().evaluate(Sums(None, None))  # type: ignore[arg-type]
    by_tokens = client_bootstrap([found.clients[c]["loss"] for c in sums], [found.weights[c] for c in sums])
    assert by_tokens.mean == pytest.approx(found.metrics["loss"])
    ends = interval(Loss(), found)
    assert ends == {"loss_low": by_tokens.low, "loss_high": by_tokens.high}
    assert by_tokens.low < found.metrics["loss"] < by_tokens.high
    alone = Evaluation({"exact_match": 0.5}, {"ann": {"exact_match": 0.5}})
    assert interval(OwnAnswers(), alone) == {}


def test_losses_and_personal_scores_have_bands(tiny_folder: Path, tmp_path: Path) -> None:
    suite = {"name": "tasks", "items_per_category": 2, "max_new_tokens": 3, "categories": ["units"], "every": 1}
    evaluate = [{"name": "loss", "every": 1}, suite]
    folder = run(tiny_folder, tmp_path / "run", evaluate=evaluate, algorithm="local").folder
    told = {(one["round"], one["name"]): one["value"] for one in lines(folder / "metrics.jsonl") if not one["client"]}
    for round_ in (1, 2):
        low, mean, high = (told[round_, f"validation/local/loss/loss{end}"] for end in ("_low", "", "_high"))
        assert low <= mean <= high and low < high
        assert (round_, "validation/local/tasks/exact_match_low") in told
    page = (folder / "report.html").read_text()
    assert page.count("Shaded: 95 % intervals, over clients") >= 2
    assert json.loads((folder / "summary.json").read_text())["not_run"] == {}
