"""Two sets of results on the same items: whether they may be paired, and what pairing them says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedloom.evaluate.stats import Interval, mcnemar, paired_bootstrap
from fedloom.report.read import Run

MODEL_KEYS = ("dtype", "quantize", "attention", "compile", "device")
LIBRARIES = ("torch", "transformers")


@dataclass(frozen=True, slots=True)
class Paired:
    """What a comparison on the same items found.

    Attributes:
        difference: mean of (second - first), with its 95 % interval.
        p: of McNemar's test; None: scores are graded.
        better, worse: items on which the second scores higher, and lower.
    """

    items: int
    first: float
    second: float
    difference: Interval
    p: float | None
    better: int
    worse: int


def settings(run: Run, evaluator: str) -> dict[str, Any]:
    """Return what an evaluator's results depend on beside the model: dotted name -> value.

    As the run has recorded it in summary.json, else as its recipe says.
    """
    recorded = run.summary.get("evaluation", {}).get(evaluator)
    told = flat({"evaluation": recorded}) if recorded else {}
    told.pop("evaluation.model", None)  # it is what is compared
    recipe = run.recipe
    own = next((one for one in recipe.get("evaluate", ()) if _named(one) == evaluator), None)
    if isinstance(own, Mapping):
        told |= flat({f"evaluate.{evaluator}": {k: v for k, v in own.items() if k not in ("name", "every")}})
    model, runtime, data = (recipe.get(key) or {} for key in ("model", "runtime", "data"))
    told |= {f"model.{key}": model.get(key) for key in MODEL_KEYS if key in model}
    told |= {f"runtime.{key}": runtime.get(key) for key in ("reference", "threads") if key in runtime}
    told |= flat({f"data.{key}": data.get(key) for key in ("template", "system") if key in data})
    return told | {f"versions.{k}": v for k, v in run.summary.get("versions", {}).items() if k in LIBRARIES}


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return the leaves of a tree by their dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{above}{key}"
        leaves |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return leaves


def unlike(a: Run, b: Run, evaluator: str) -> list[str]:
    """Return every evaluation setting in which two runs differ, in words; none: their results may be paired."""
    first, second = settings(a, evaluator), settings(b, evaluator)
    names = [name for name in dict.fromkeys([*first, *second]) if first.get(name) != second.get(name)]
    return [f"{name} is {_told(first, name)} in {a.name} and {_told(second, name)} in {b.name}" for name in names]


def items(run: Run, evaluator: str, regime: str) -> dict[str, tuple[str, float]]:
    """Return item -> (hash of its prompt, score); of personal adapters, the mean score over clients."""
    hashes: dict[str, str] = {}
    scores: dict[str, list[float]] = {}
    for line in run.samples.get(evaluator, ()):
        if line.get("regime") == regime and line.get("score") is not None:
            hashes[line["id"]] = str(line.get("prompt_sha256", ""))
            scores.setdefault(line["id"], []).append(float(line["score"]))
    return {name: (hashes[name], float(np.mean(found))) for name, found in scores.items()}


def apart(a: Mapping[str, tuple[str, float]], b: Mapping[str, tuple[str, float]]) -> str:
    """Return why two sets of items cannot be paired, or ""."""
    if not a or not b:
        return "there are no samples of one of them"
    if a.keys() != b.keys():
        return f"they answered other items ({len(a)} and {len(b)}, {len(a.keys() & b.keys())} in common)"
    other = [name for name in a if a[name][0] != b[name][0]]
    return f"the prompts of {len(other)} items differ, {other[0]} among them" if other else ""


def pair(a: Mapping[str, tuple[str, float]], b: Mapping[str, tuple[str, float]]) -> Paired:
    """Compare two sets of scores on the same items (`apart` has found nothing)."""
    first, second = (np.array([one[name][1] for name in a]) for one in (a, b))
    graded = not np.isin([first, second], (0, 1)).all()
    return Paired(
        items=len(first),
        first=float(first.mean()),
        second=float(second.mean()),
        difference=paired_bootstrap(second, first, [0] * len(first)),
        p=None if graded else mcnemar(second, first),
        better=int((second > first).sum()),
        worse=int((second < first).sum()),
    )


def over_clients(a: Mapping[str, float], b: Mapping[str, float]) -> tuple[Interval, int, int] | None:
    """Return the mean difference b - a over clients with its interval, and for how many it falls and rises.

    None: fewer than two clients have both.
    """
    names = [name for name in a if name in b]
    if len(names) < 2:
        return None
    first, second = np.array([a[n] for n in names]), np.array([b[n] for n in names])
    found = paired_bootstrap(second, first, [0] * len(names))
    return found, int((second < first).sum()), int((second > first).sum())


def p_text(p: float | None) -> str:
    """Return a p-value for people."""
    return "–" if p is None else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _named(one: Any) -> str | None:
    return one.get("name") if isinstance(one, Mapping) else one


def _told(found: Mapping[str, Any], name: str) -> str:
    return repr(found[name]) if name in found else "not set"


def evaluators(runs: Sequence[Run]) -> list[str]:
    """Return the evaluators that keep samples in every run."""
    return [name for name in runs[0].samples if all(name in run.samples for run in runs)]
