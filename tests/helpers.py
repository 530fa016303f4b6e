"""Small runs on the tiny model, and a way to look at what they made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import fedloom
from fedloom.recipe import overlay

MODEL = {"dtype": "fp32", "attention": "sdpa", "device": "cpu"}


def tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return a recipe for the tiny model in `folder`: 3 clients, 2 rounds, 2 steps of 2 rows."""
    base: dict[str, Any] = {
        "model": {"name": str(folder), **MODEL},
        "adapter": {"name": "lora", "r": 2, "alpha": 4},
        "data": {
            "source": {"name": "tasks", "rows_per_category": 5, "categories": ["units", "sorting", "logic"]},
            "clients": 3,
            "partition": {"name": "by", "key": "category"},
            "splits": {"train": 0.6, "validation": 0.2, "test": 0.2},
        },
        "trainer": {"optimizer": "adamw", "lr": 1e-2, "steps": 2, "batch": 2},
        "runtime": {"threads": 1},
        "rounds": 2,
        "evaluate": [{"name": "loss", "every": 1}],
    }
    return overlay(base, changes)


def run(folder: Path, out: Path, *texts: str, **changes: Any) -> fedloom.Result:
    """Run such a recipe."""
    return fedloom.run(tree(folder, **changes), *texts, out=out)


def adapter(result: fedloom.Result | Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a run's global adapter."""
    folder = result if isinstance(result, Path) else result.folder
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Return whether two maps hold the same names and the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
