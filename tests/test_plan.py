"""The plan tells what will happen: who trains on how much, and on what the best round will be chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.helpers import tree

import fedloom
from fedloom.tracking import Plan, Sink


class Plans(Sink):
    """Keeps the lines of each regime's plan."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, str]] = {}

    def on(self, event: object) -> None:
        if isinstance(event, Plan):
            self.found[event.regime] = dict(event.lines)


def plans(tiny_folder: Path, out: Path, **changes: Any) -> dict[str, dict[str, str]]:
    told = Plans()
    fedloom.run(
        tree(tiny_folder, **{"rounds": 1, "evaluate": [{"name": "loss", "every": 1}], **changes}), out=out, sink=told
    )
    return told.found


def test_rows_are_those_of_the_clients_that_train(tiny_folder: Path, tmp_path: Path) -> None:
    sizes = {"partition": {"name": "dirichlet", "key": "category", "alpha": 0.5}, "clients": 4, "unseen": 0.25}
    found = plans(tiny_folder, tmp_path / "a", data=sizes, compare=["centralized"])
    table = json.loads((tmp_path / "a" / "split.json").read_text())
    seen = [len(rows["train"]) for name, rows in table.items() if isinstance(rows, dict)]
    told = found["federated"]["clients"]
    assert told.startswith("3 (")
    counts = [int(word) for word in told.replace(",", "").split() if word.isdigit()]
    assert set(counts[-2:]) <= set(seen)
    total = found["centralized"]["clients"]
    assert total.startswith("1 (")
    assert " to " not in total


def test_few_validation_rows_are_told(tiny_folder: Path, tmp_path: Path) -> None:
    found = plans(tiny_folder, tmp_path / "a")
    assert "3 validation rows" in found["federated"]["best"]
    found = plans(tiny_folder, tmp_path / "b", evaluate=[{"name": "loss", "every": 0}])
    assert "best" not in found["federated"]
