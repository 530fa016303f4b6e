"""Runs the programs that a run kept because there was no sandbox, and puts their scores where they belong."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from fedloom.evaluate.code.base import Attempt, CodeEvaluator
from fedloom.evaluate.code.judging import Verdict, judge
from fedloom.evaluate.probe import chosen
from fedloom.evaluate.view import spread
from fedloom.outcome import write_summary
from fedloom.reopen import read_recipe
from fedloom.tracking import MetricsFile, keep_lines
from fedloom.types import ModelError
from fedloom.wire.codec import write_atomic

Row: TypeAlias = tuple[int, str | None, Mapping[str, float]]
"""Round, client (None: all), and metrics by name, as `MetricsFile.add` takes them."""


def rescore(folder: Path, unsafe: bool = False) -> dict[str, Any]:
    """Judge the programs of a run's code evaluators that could not be run, and return its new summary.

    The samples, metrics.jsonl, summary.json and those of compared regimes are rewritten; nothing is generated anew.

    Args:
        folder: a finished run folder, or the folder of `fedloom eval --out`.
        unsafe: run programs as plain processes; the result is marked.

    Raises:
        ModelError: the folder has no summary, or no program waits, or there is still no sandbox.
    """
    recipe = read_recipe(folder)
    if not (folder / "summary.json").is_file():
        raise ModelError(f"{folder} holds no summary.json; finish it with: fedloom run --resume {folder}")
    evaluators = [one for one in recipe.evaluate if isinstance(one, CodeEvaluator)]
    summary = _read(folder)
    places = {name: folder / "regimes" / name for name in recipe.compare}
    if not any(_waiting(place, one) for one in evaluators for place in (folder, *places.values())):
        raise ModelError(f"{folder}: no program waits to be run")
    if isinstance(runner := chosen(unsafe), str):
        raise ModelError(f"the programs still cannot be run: {runner}; --unsafe-execution runs them without a sandbox")
    judged, rows = _place(folder, evaluators, summary, unsafe)
    booked = {folder: rows}
    for name, place in places.items():
        other = _read(place)
        more, booked[place] = _place(place, evaluators, other, unsafe)
        judged |= more
        write_summary(place, other)
        for key in ("metrics", "not_run"):
            summary[key][name] = other[key].get(name, {})
    summary["not_run"] = {regime: why for regime, why in summary["not_run"].items() if why}
    write_summary(folder, summary)
    for place, rows in booked.items():
        _log(place / "metrics.jsonl", rows)
    for path, lines in judged.items():  # last, so that after a kill they still wait
        write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    return summary


def _place(
    place: Path, evaluators: Iterable[CodeEvaluator], summary: dict[str, Any], unsafe: bool
) -> tuple[dict[Path, list[dict[str, Any]]], list[Row]]:
    """Judge the programs of one run folder and put the results into its summary.

    Returns:
        Its samples with scores by file, and the rows of its metrics.
    """
    judged, rows = {}, list[Row]()
    for evaluator in evaluators:
        if not _waiting(place, evaluator):
            continue
        path = _samples(place, evaluator)
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        evaluator = evaluator.model_copy(update={"unsafe_execution": unsafe})
        _judge(evaluator, lines)
        judged[path] = lines
        for regime in dict.fromkeys(line["regime"] for line in lines):
            rows += _book(evaluator, [line for line in lines if line["regime"] == regime], regime, summary)
    return judged, rows


def _log(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to metrics.jsonl, in place of those of the same names."""
    rows = list(rows)
    names = {name for _, _, metrics in rows for name in metrics}
    keep_lines(path, lambda line: line["name"] not in names)
    file = MetricsFile(path)
    for round_, client, metrics in rows:
        file.add(round_, client, metrics)
    file.flush()


def _judge(evaluator: CodeEvaluator, lines: list[dict[str, Any]]) -> None:
    """Give every program without a score its score and verdict."""
    language = {task.id: task.language for task in evaluator.tasks().items}
    waiting = [line for line in lines if line["score"] is None]
    runner = chosen(evaluator.unsafe_execution)
    if isinstance(runner, str):
        raise ModelError(f"the programs cannot be run: {runner}")
    verdicts = judge(runner, [(language[line["id"]], line["extracted"]) for line in waiting])
    for line, verdict in zip(waiting, verdicts, strict=True):
        line["score"], line["verdict"] = verdict.score, verdict.text


def _book(evaluator: CodeEvaluator, lines: list[dict[str, Any]], regime: str, summary: dict[str, Any]) -> list[Row]:
    """Put the metrics of one regime into a summary, and what is still not run; return their rows."""
    found = evaluator.tasks()
    tasks, name = {task.id: task for task in found.items}, evaluator.part_name
    attempts: dict[str | None, list[Attempt]] = {}
    for line in lines:
        verdict = Verdict(line["score"], line.get("verdict", ""))
        attempt = Attempt(tasks[line["id"]], line["prompt"], line["output"], line["extracted"], verdict)
        attempts.setdefault(line["client"], []).append(attempt)
    told = evaluator.told(found, attempts, chosen(evaluator.unsafe_execution))
    metrics: Mapping[str, float] = {**told.metrics, **spread(evaluator, told.clients)}
    summary["metrics"].setdefault(regime, {})[name] = metrics
    reasons = summary["not_run"].setdefault(regime, {})
    reasons.pop(name, None)
    if told.not_run:
        reasons[name] = told.not_run
    summary["evaluation"].setdefault(name, {}).update(told.settings)
    every: list[tuple[str | None, Mapping[str, float]]] = [(None, metrics), *told.clients.items()]
    return [
        (lines[0]["round"], client, {f"test/{regime}/{name}/{key}": value for key, value in found.items()})
        for client, found in every
    ]


def _waiting(place: Path, evaluator: CodeEvaluator) -> bool:
    path = _samples(place, evaluator)
    if not path.is_file():
        return False
    return any(json.loads(line)["score"] is None for line in path.read_text(encoding="utf-8").splitlines())


def _samples(place: Path, evaluator: CodeEvaluator) -> Path:
    return place / "samples" / f"{evaluator.part_name}.jsonl"


def _read(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "summary.json").read_text(encoding="utf-8"))
    return found
