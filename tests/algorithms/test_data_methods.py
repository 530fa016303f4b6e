"""What FedDQC, FedDCA, FedIT-U2S and layer selection share: unseen clients, adaptation, and cohorts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import adapter, run

DATA = {"public": 6, "source": {"rows_per_category": 8}}
METHODS: list[dict[str, Any]] = [
    {"name": "selective", "budget": 1},
    {"name": "feddqc", "stages": 2, "stage_rounds": 1},
    {"name": "feddca", "centres": 2, "retrieve": 2},
    {"name": "fedit-u2s", "max_new_tokens": 2},
]


@pytest.mark.parametrize("algorithm", METHODS, ids=lambda one: one["name"])
def test_unseen_clients_and_adaptation(tiny_folder: Path, tmp_path: Path, algorithm: dict[str, Any]) -> None:
    """A client that never took part is measured with what it would be sent, before and after steps of its own."""
    data = {**DATA, "unseen": 0.34}
    result = run(tiny_folder, tmp_path / "r", data=data, algorithm=algorithm, adapt_steps=1, rounds=1)
    assert {"federated", "federated adapted", "unseen", "unseen adapted"} <= set(result.metrics)
    assert all(math.isfinite(found["loss"]["loss"]) for found in result.metrics.values())


@pytest.mark.parametrize("algorithm", METHODS[:3], ids=lambda one: one["name"])
def test_clients_side_by_side_are_clients_one_by_one(
    tiny_folder: Path, tmp_path: Path, algorithm: dict[str, Any]
) -> None:
    changes = {"data": DATA, "algorithm": algorithm, "model": {"dtype": "fp64"}, "trainer": {"optimizer": "sgd"}}
    one, three = (
        adapter(run(tiny_folder, tmp_path / str(size), runtime={"threads": 1, "cohort": size}, **changes))
        for size in (1, 3)
    )
    for name in one:
        torch.testing.assert_close(one[name], three[name], rtol=0, atol=1e-6)
