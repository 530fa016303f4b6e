"""What a comparison needs of one run's regime, and whether two of them may be paired."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedloom.evaluate import Evaluator
from fedloom.evaluate.scored import Item
from fedloom.report import compare
from fedloom.report.read import Run


@dataclass(frozen=True, slots=True)
class Side:
    """A regime of a run, by what was measured on it. It is small: prompts and answers are not kept.

    Attributes:
        settings: evaluator -> what its results depend on beside the model (`compare.settings`).
        items: evaluator -> its items; the clients themselves, where it keeps no samples but measures them apart.
        not_run: evaluator -> why it was not run, as in summary.json.
    """

    settings: Mapping[str, Mapping[str, Any]]
    items: Mapping[str, Mapping[str, Item]]
    not_run: Mapping[str, str]


def side(run: Run, regime: str) -> Side:
    """Return what a comparison needs of a regime that a run has measured."""
    measured = run.metrics.get(regime, {})
    return Side(
        {name: compare.settings(run, name) for name in measured},
        {
            name: found
            for name in measured
            if (found := compare.items(run, name, regime) if name in run.samples else _clients(run, name, regime))
        },
        (run.summary.get("not_run") or {}).get(regime, {}),
    )


def _clients(run: Run, evaluator: str, regime: str) -> dict[str, Item]:
    """Return clients as items: each with its rows and the main metric on them; {} of fewer than two."""
    part = Evaluator.known.get(evaluator)
    metric = part.primary if part is not None and issubclass(part, Evaluator) else evaluator
    values = run.others.get(regime, run).tested.get((regime, evaluator, metric), {})
    found = {name: Item(run.tests.get(name, ""), value, "", None) for name, value in values.items()}
    return found if len(found) > 1 else {}


def evaluators(*sides: Side) -> list[str]:
    """Return the evaluators of which at least one side has items."""
    return list(dict.fromkeys(name for one in sides for name in one.items))


def why_not(a: Side, b: Side, evaluator: str, names: tuple[str, str]) -> str:
    """Return why the results of two sides cannot be paired, or "".

    Args:
        names: what a person calls the two.
    """
    for one, name in zip((a, b), names, strict=True):
        if evaluator not in one.settings:
            reason = one.not_run.get(evaluator)
            return f"{name} did not run {evaluator}" + (f" ({reason})" if reason else "")
    if odd := compare.unlike(a.settings[evaluator], b.settings[evaluator], names):
        return "their evaluation settings differ: " + "; ".join(odd)
    return compare.apart(a.items.get(evaluator, {}), b.items.get(evaluator, {}))
