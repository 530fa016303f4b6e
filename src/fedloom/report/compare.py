"""Two sets of results on the same items: whether they may be paired, and what pairing them says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedloom.evaluate import scored
from fedloom.evaluate.scored import Answered, Item
from fedloom.evaluate.stats import Interval, mcnemar, paired_bootstrap
from fedloom.report.read import Run

MODEL_KEYS = ("dtype", "quantize", "attention", "compile", "device")
LIBRARIES = ("torch", "transformers")


@dataclass(frozen=True, slots=True)
class Paired:
    """What a comparison on the same items found.

    Attributes:
        first, second: the evaluator's primary metric: the mean over strata of the mean over items.
        difference: second - first, with its 95 % interval (bootstrap over items within strata).
        p: of McNemar's test of right and wrong answers; None: scores are graded, or means over several answers.
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


def unlike(first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str]) -> list[str]:
    """Return every evaluation setting in which two runs differ, in words; none: their results may be paired.

    Args:
        first, second: of `settings`, for one evaluator.  names: what a person calls the two runs.
    """
    odd = [key for key in dict.fromkeys([*first, *second]) if first.get(key) != second.get(key)]
    return [f"{key} is {_told(first, key)} in {names[0]} and {_told(second, key)} in {names[1]}" for key in odd]


def items(run: Run, evaluator: str, regime: str) -> dict[str, Item]:
    """Return item -> its prompt's hash, score, stratum, and whether it is right; of personal adapters, over clients."""
    return scored.items(
        Answered(line["id"], float(line["score"]), line.get("stratum", ""), str(line.get("prompt_sha256", "")))
        for line in run.samples.get(evaluator, ())
        if line.get("regime") == regime and line.get("score") is not None
    )


def apart(a: Mapping[str, Item], b: Mapping[str, Item]) -> str:
    """Return why two sets of items cannot be paired, or ""."""
    if not a or not b:
        return "there are no samples of one of them"
    if a.keys() != b.keys():
        return f"they answered other items ({len(a)} and {len(b)}, {len(a.keys() & b.keys())} in common)"
    if other := [name for name in a if a[name].prompt != b[name].prompt]:
        return f"the prompts or rows of {len(other)} items differ, {other[0]} among them"
    if other := [name for name in a if a[name].stratum != b[name].stratum]:
        where = f"{a[other[0]].stratum!r} and {b[other[0]].stratum!r}"
        return f"{len(other)} items count in other strata, {other[0]} among them (in {where})"
    return ""


def pair(a: Mapping[str, Item], b: Mapping[str, Item]) -> Paired:
    """Compare two sets of scores on the same items (`apart` has found nothing)."""
    first, second = (np.array([one[name].score for name in a]) for one in (a, b))
    known = all(one.right is not None for found in (a, b) for one in found.values())
    return Paired(
        items=len(first),
        first=scored.primary(a),
        second=scored.primary(b),
        difference=paired_bootstrap(second, first, [one.stratum for one in a.values()]),
        p=mcnemar(second, first) if known else None,
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
