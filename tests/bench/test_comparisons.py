"""What a bench says of differences: the item is the unit, whatever answers it again."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from tests.bench.runs import answers, outcome
from tests.helpers import lines, run

from fedloom.bench import Bench, Cell, Outcome, tabulate
from fedloom.bench.comparisons import RECIPES, REGIMES, VARIATIONS
from fedloom.evaluate import stats

WORSE = answers(*[1] * 50, *[0] * 40, *[1] * 3, *[0] * 7)
BETTER = answers(*[1] * 50, *[0] * 40, *[0] * 3, *[1] * 7)


def two(out: Path, seeds: int) -> Bench:
    """Return a bench of the same two sets of answers at every seed."""
    sides = {"a": WORSE, "b": BETTER}
    return tabulate(
        [
            outcome(out, ("r", label, seed), {"federated": scores})
            for label, scores in sides.items()
            for seed in range(seeds)
        ]
    )


def test_seeds_that_answer_alike_narrow_no_interval(tmp_path: Path) -> None:
    (alone,), (often,) = two(tmp_path / "1", 1).comparisons, two(tmp_path / "5", 5).comparisons
    assert (often.difference, often.low, often.high, often.items) == (alone.difference, alone.low, alone.high, 100)
    (one,) = alone.seeds
    assert one.p == stats.mcnemar([s for (s,) in WORSE.values()], [s for (s,) in BETTER.values()]) > 0.3
    assert len(often.seeds) == 5 and all(at.p >= one.p for at in often.seeds)  # five tests, adjusted
    assert often.spread == (pytest.approx(0.04), pytest.approx(0)) and alone.spread == (pytest.approx(0.04), None)


def test_an_item_counts_by_its_mean_over_the_seeds_of_both_sides(tmp_path: Path) -> None:
    scores = {"a": [[1, 0, 1, 0], [1, 1, 0, 0]], "b": [[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]]}
    found = [
        outcome(tmp_path, ("r", label, seed), {"federated": answers(*one)})
        for label, seeds in scores.items()
        for seed, one in enumerate(seeds)
    ]
    (one,) = tabulate(found).comparisons
    expected = stats.paired_bootstrap([0.5, 1, 1, 1], [1, 0.5, 0.5, 0], [""] * 4)
    assert (one.difference, one.low, one.high) == (expected.mean, expected.low, expected.high)
    alone = [stats.mcnemar(a, b) for a, b in zip(scores["a"], scores["b"], strict=False)]
    assert [at.p for at in one.seeds] == stats.holm(alone)
    assert [(at.seed, at.difference, at.items) for at in one.seeds] == [(0, 0.5, 4), (1, 0.25, 4)]
    assert one.spread == (0.375, statistics.stdev([0.5, 0.25]))
    assert (one.group, one.where, one.first, one.second, one.items) == (VARIATIONS, "r", "a", "b", 4)


def test_samples_of_an_item_are_averaged_and_strata_weigh_alike(tmp_path: Path) -> None:
    a = {"x/0": [1, 1, 1, 0], "y/0": [0], "y/1": [0], "y/2": [0]}
    b = {"x/0": [1, 1, 1, 1], "y/0": [1], "y/1": [0], "y/2": [0]}
    (one,) = tabulate([outcome(tmp_path, ("r", n, 0), {"federated": s}) for n, s in (("a", a), ("b", b))]).comparisons
    assert one.difference == pytest.approx((0.25 + 1 / 3) / 2)
    assert one.seeds[0].p is None


def test_the_recipes_own_regime_is_compared_with_the_others(tmp_path: Path) -> None:
    regimes = {"federated": answers(1, 1, 1, 0), "local": answers(0, 1, 0, 0), "centralized": answers(1, 1, 1, 1)}
    found = tabulate([outcome(tmp_path, ("r", "a", 0), regimes)])
    told = [(one.group, one.where, one.first, one.second, one.difference) for one in found.comparisons]
    assert told == [
        (REGIMES, "r, a", "local", "federated", 0.5),
        (REGIMES, "r, a", "centralized", "federated", -0.25),
    ]
    assert not found.unpaired


def test_recipes_of_the_same_data_are_compared(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"r": {}, "s": {}, "t": {"recipe": {"data": {"source": "other"}}}}
    found = tabulate(
        [outcome(tmp_path, (n, "a", 0), {"federated": answers(n == "s", 1)}, **more) for n, more in changes.items()]
    )
    told = [(one.group, one.where, one.first, one.second, one.difference) for one in found.comparisons]
    assert told == [(RECIPES, "a", "r", "s", 0.5)]
    assert found.unpaired == ["a: r and t have other data (data.source differ)"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"summary": {"evaluation": {"tasks": {"dtype": "bf16"}}}},
            "their evaluation settings differ: evaluation.dtype is not set in a and 'bf16' in b",
        ),
        (
            {"recipe": {"runtime": {"threads": 2}}},
            "their evaluation settings differ: runtime.threads is not set in a and 2 in b",
        ),
        (
            {"run_by": {"federated": ["loss"]}, "summary": {"not_run": {"federated": {"tasks": "no sandbox"}}}},
            "b did not run tasks (no sandbox)",
        ),
    ],
)
def test_what_measured_other_things_is_not_compared(tmp_path: Path, change: Any, why: str) -> None:
    """At the seed where it is so; the others are compared."""
    runs = [
        outcome(tmp_path, ("r", n, seed), {"federated": answers(1, 0)}, **(change if n == "b" and seed else {}))
        for n in "ab"
        for seed in (0, 1)
    ]
    found = tabulate(runs)
    assert found.unpaired == [f"r, tasks, b against a: seed 1: {why}"]
    assert [at.seed for one in found.comparisons for at in one.seeds] == [0]
    assert f"- not paired: r, tasks, b against a: seed 1: {why}" in found.markdown()
    assert tabulate(runs[1::2]).unpaired == [f"r, tasks, b against a: {why}"]


def test_another_model_is_what_is_compared_and_other_items_are_not(tmp_path: Path) -> None:
    runs = [
        outcome(tmp_path, ("r", "a", 0), {"federated": answers(1, 0)}),
        outcome(tmp_path, ("r", "b", 0), {"federated": answers(1, 1)}, recipe={"model": {"name": "another"}}),
        outcome(tmp_path, ("r", "c", 0), {"federated": answers(1, 1, 1)}),
        outcome(tmp_path, ("r", "d", 7), {"federated": answers(1, 1)}),
    ]
    found = tabulate(runs)
    assert [(one.second, one.difference) for one in found.comparisons] == [("b", 0.5)]
    assert found.unpaired == [
        "r, tasks, c against a: they answered other items (2 and 3, 2 in common)",
        "r: a and d have no seed in common",
    ]


def test_every_file_has_the_comparisons(tmp_path: Path) -> None:
    found = two(tmp_path / "runs", 2)
    paths = {path.name: path.read_text() for path in found.write(tmp_path / "out")}
    (one,) = json.loads(paths["table.json"])["comparisons"]
    assert (one["difference"], len(one["seeds"]), one["group"]) == (pytest.approx(0.04), 2, VARIATIONS)
    rows = list(csv.DictReader(paths["comparisons.csv"].splitlines()))
    assert [row["seed"] for row in rows] == ["all", "0", "1"]
    assert [float(row["difference"]) for row in rows] == [pytest.approx(0.04)] * 3
    assert float(rows[0]["low"]) == found.comparisons[0].low and float(rows[1]["p_holm"]) == one["seeds"][0]["p"]
    for name in ("table.md", "table.tex"):
        assert VARIATIONS in paths[name] and "+0.04" in paths[name]
    assert paths["table.tex"].count(r"\begin{tabular}") == 2 and r"95 \% interval" in paths["table.tex"]


def test_where_no_samples_are_kept_clients_are_the_items(tiny_folder: Path, tmp_path: Path) -> None:
    """Loss, measured at the clients; clients of other rows are not compared."""
    outcomes = []
    for label, changes in (("fedavg", {}), ("local", {"algorithm": "local"}), ("iid", {"data": {"partition": "iid"}})):
        folder = tmp_path / label
        run(tiny_folder, folder, rounds=1, evaluate=[{"name": "loss", "every": 0}], **changes)
        summary = json.loads((folder / "summary.json").read_text())
        outcomes.append(Outcome(Cell("r", (("algorithm", label),), 0, (), folder), summary))
    found = tabulate(outcomes)
    (one,) = found.comparisons
    means = [
        statistics.fmean(
            line["value"]
            for line in lines(tmp_path / name / "metrics.jsonl")
            if line["client"] and line["name"] == f"test/{regime}/loss/loss"
        )
        for name, regime in (("fedavg", "federated"), ("local", "local"))
    ]
    assert (one.evaluator, one.items, one.seeds[0].p) == ("loss", 3, None)
    assert one.difference == pytest.approx(means[1] - means[0])
    assert any("iid" in line and "prompts or rows of" in line for line in found.unpaired)
