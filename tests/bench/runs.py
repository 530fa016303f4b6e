"""Run folders with given scores, made by hand: what a comparison reads of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fedloom.bench import Cell, Outcome

Answers = Mapping[str, list[float]]
"""Item -> scores of its samples; `stratum/name` gives an item a stratum."""


def outcome(out: Path, cell: tuple[str, str, int], regimes: Mapping[str, Answers], **changes: Any) -> Outcome:
    """Write a run whose evaluator is `tasks`, and return it as a cell of a bench.

    Args:
        cell: recipe, variation and seed.  regimes: regime -> scores; the first is the run's own.
        changes: `recipe` and `summary`: keys that differ; `run_by`: regime -> evaluators, where not `tasks`.
    """
    recipe, label, seed = cell
    folder = out / recipe / label / str(seed)
    own, *others = regimes
    run_by = changes.get("run_by", {})
    metrics = {name: {one: {"exact_match": 0.5} for one in run_by.get(name, ["tasks"])} for name in regimes}
    summary = {"metrics": metrics, "bytes_up": 1, "bytes_down": 1, "trained_tokens": 1, "fit_seconds": 1.0}
    summary |= {"peak_rss_bytes": 1, **changes.get("summary", {})}
    written = {"seed": seed, "rounds": 1, "data": {"source": "s"}, "evaluate": ["tasks"], **changes.get("recipe", {})}
    for name, place in [(own, folder), *((name, folder / "regimes" / name) for name in others)]:
        (place / "samples").mkdir(parents=True)
        (place / "recipe.yaml").write_text(yaml.safe_dump(written))
        (place / "summary.json").write_text(json.dumps(summary if place == folder else {**summary, "metrics": {}}))
        lines = [
            {"regime": name, "client": None, "id": item, "score": score, "stratum": item.rpartition("/")[0]}
            for item, scores in regimes[name].items()
            for score in scores
        ]
        text = "".join(json.dumps({**line, "prompt_sha256": line["id"]}) + "\n" for line in lines)
        (place / "samples" / "tasks.jsonl").write_text(text)
    return Outcome(Cell(recipe, (("algorithm", label),), seed, (), folder), summary)


def answers(*scores: float) -> dict[str, list[float]]:
    """Return items i0, i1, ... of one score each."""
    return {f"i{i}": [score] for i, score in enumerate(scores)}
