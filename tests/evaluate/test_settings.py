from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.helpers import adapter, lines, run, same

EVALUATORS = [
    {"name": "loss", "every": 1},
    {"name": "tasks", "items_per_category": 1, "categories": ["units"], "max_new_tokens": 3, "every": 1},
]


def test_a_run_with_and_without_evaluation_ends_in_the_same_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    streams = []
    for name, evaluators in (("with", EVALUATORS), ("without", [])):
        torch.manual_seed(0)
        run(tiny_folder, tmp_path / name, adapter={"dropout": 0.1}, evaluate=evaluators)
        streams.append(torch.get_rng_state())
    assert same(adapter(tmp_path / "with"), adapter(tmp_path / "without"))
    assert torch.equal(*streams)


def test_results_tell_what_they_depend_on(tiny_folder: Path, tmp_path: Path) -> None:
    result = run(tiny_folder, tmp_path / "run", evaluate=EVALUATORS)
    told = json.loads((result.folder / "summary.json").read_text())["evaluation"]
    assert set(told) == {"loss", "tasks"}
    tasks = told["tasks"]
    assert (tasks["dtype"], tasks["engine"], tasks["batch_rows"], tasks["device"]) == ("float32", "fedloom", 32, "cpu")
    assert (tasks["max_new_tokens"], tasks["items_per_category"]) == (3, 1)
    assert tasks["versions"]["torch"] == torch.__version__
    assert "every" not in tasks


@pytest.mark.data
def test_two_evaluations_of_one_adapter_give_identical_samples(tiny_folder: Path, tmp_path: Path) -> None:
    evaluators = [{"name": "mmlu", "limit": 3, "shots": 0}, {"name": "gsm8k", "limit": 2, "max_new_tokens": 4}]
    folders = [run(tiny_folder, tmp_path / name, rounds=1, evaluate=evaluators).folder for name in ("a", "b")]
    for name in ("mmlu", "gsm8k"):
        first, second = (lines(folder / "samples" / f"{name}.jsonl") for folder in folders)
        assert first == second
        assert len(first) == 2 * (3 if name == "mmlu" else 2)  # the base and the federated adapter
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in folders)
    assert first["evaluation"] == second["evaluation"]
    assert first["metrics"] == second["metrics"]
