"""What the page answers: comparisons of the metric that they name, adjusted for their number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedloom.evaluate import Evaluator
from fedloom.evaluate.stats import holm, mcnemar
from fedloom.report import compare
from fedloom.report.compare import Item
from fedloom.report.read import Run
from fedloom.report.results import answer, dot_of, paired


def scored_run(
    folder: Path, evaluator: str, found: dict[str, list[tuple[str, float]]], values: dict[str, float]
) -> Run:
    """Return a run whose regimes answered items: regime -> (stratum, score) of each, and its reported metric."""
    samples = [
        {"regime": r, "client": None, "id": f"{i}", "prompt_sha256": "", "score": score, "stratum": stratum}
        for r, ones in found.items()
        for i, (stratum, score) in enumerate(ones)
    ]
    metric = Evaluator.known[evaluator].primary  # type: ignore[attr-defined]
    metrics = {r: {evaluator: {metric: value}} for r, value in values.items()}
    return Run(folder, {"rounds": 1}, {"metrics": metrics}, metrics=metrics, samples={evaluator: samples})


def test_a_comparison_is_of_the_metric_that_it_names(tmp_path: Path) -> None:
    found = {
        "base": [("a", 0.0)] * 30 + [("b", 1.0)] * 5 + [("b", 0.0)] * 5,
        "federated": [("a", 0.0)] * 30 + [("b", 1.0)] * 9 + [("b", 0.0)],
    }
    values = {"base": 0.25, "federated": 0.45}  # macro; of all items it is 5 / 40 and 9 / 40
    told = scored_run(tmp_path, "bbh", found, values)
    pair = compare.pair(*(compare.items(told, "bbh", regime) for regime in values))
    assert (pair.first, pair.second, pair.difference.mean) == (0.25, pytest.approx(0.45), pytest.approx(0.2))
    assert pair.p == mcnemar([1.0] * 4, [0.0] * 4)
    text = str(answer(told).body)
    assert "on the same 40 items, exact match +20.0 points (95 % interval by bootstrap over items" in text
    dot, note = dot_of(told, "bbh", "exact_match", "federated")
    assert dot.low is not None and dot.high is not None and dot.low < 0.45 < dot.high
    assert note == "Bars: 95 % intervals (bootstrap over items within strata, 40 items)"
    other = scored_run(tmp_path, "bbh", found, {"base": 0.125, "federated": 0.3})  # samples of another metric
    assert dot_of(other, "bbh", "exact_match", "federated")[0].low is None
    assert "on the same" not in str(answer(other).body)


def test_graded_scores_are_in_their_own_unit_and_without_a_test(tmp_path: Path) -> None:
    found = {"base": [("", 3.0 + i % 3) for i in range(9)], "federated": [("", 4.0 + i % 4) for i in range(9)]}
    values = {name: float(np.mean([score for _, score in ones])) for name, ones in found.items()}
    text = str(answer(scored_run(tmp_path, "judge", found, values)).body)
    assert "on the same 9 items, rating +1.33 (95 %" in text and "McNemar" not in text


def test_all_tests_of_a_page_are_adjusted_together(tmp_path: Path) -> None:
    right = {"base": 2, "local": 4, "federated": 10}
    told = [
        scored_run(tmp_path, name, {r: [("", float(i < n)) for i in range(20)] for r, n in right.items()},
                   {r: n / 20 for r, n in right.items()})
        for name in ("gsm8k", "mmlu")
    ]  # fmt: skip
    both = {r: {**told[0].metrics[r], **told[1].metrics[r]} for r in right}
    samples = told[0].samples | told[1].samples
    others = {"local": Run(tmp_path, {})}
    run_ = Run(tmp_path, {"rounds": 1}, {"metrics": both}, metrics=both, samples=samples, others=others)
    pairs = paired(run_, ["gsm8k", "mmlu"])
    raw = [one.p for one, _ in pairs.values() if one.p is not None]
    assert len(raw) == 4 and [p for _, p in pairs.values()] == holm(raw) != raw
    page = str(answer(run_).body)
    assert page.count("McNemar&#39;s test of right and wrong answers, p = ") == 4
    for _, p in pairs.values():
        assert f"{compare.p_text(p)} (Holm)" in page


def test_items_of_other_strata_are_not_paired() -> None:
    a, b = ({"x": Item("", 1.0, stratum, True)} for stratum in ("units", ""))
    assert compare.apart(a, b) == "1 items count in other strata, x among them (in 'units' and '')"
