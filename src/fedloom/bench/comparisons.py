"""Which differences of a bench are more than chance: variations, regimes and recipes, item by item.

The item is the unit, since seeds and clients that answer it again tell nothing of other items. Its score is the mean
over clients, and over the seeds that both sides have; the difference is the mean over strata of its mean over items,
and its interval is a paired bootstrap of the items within their strata. It tells of these training seeds; how much
another one would change, the differences at each seed tell. McNemar's exact test is made at each seed, where every item
is right or wrong once, and adjusted (Holm) for the number of all tests of the bench.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from fedloom.bench.grid import Outcome
from fedloom.evaluate import stats
from fedloom.report import compare
from fedloom.report.read import read
from fedloom.report.sides import Side, evaluators, side, why_not

VARIATIONS = "Variations against the first of their recipe"
REGIMES = "Training together against training alone, and on all rows in one place"
RECIPES = "Recipes against the first one"


@dataclass(frozen=True, slots=True)
class AtSeed:
    """A comparison at one seed.

    Attributes:
        difference: of the evaluator's main metric, second minus first.
        p: of McNemar's exact test, adjusted; None: scores are graded.  items: of this seed.
    """

    seed: int
    difference: float
    p: float | None
    items: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """How the second of two sides differs from the first on one evaluator.

    Attributes:
        group: what kind of sides these are.  where: what both have in common.
        difference, low, high: of the main metric, second minus first, with its 95 % interval over items.
        items: how many, each counted once.  seeds: each alone.
    """

    group: str
    where: str
    evaluator: str
    first: str
    second: str
    difference: float
    low: float
    high: float
    items: int
    seeds: Sequence[AtSeed]

    @property
    def spread(self) -> tuple[float, float | None]:
        """Mean and standard deviation over seeds; of one seed there is no deviation."""
        found = [one.difference for one in self.seeds]
        return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None


@dataclass(frozen=True, slots=True)
class _Kept:
    """What comparisons need of a run: its regimes, its own first, and the data it was made of."""

    sides: Mapping[str, Side]
    data: Mapping[str, Any]


_Runs = Mapping[int, _Kept]
"""Seed -> run of a recipe and a variation."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """Two sides to compare: at each seed that both have, one of either."""

    group: str
    where: str
    names: tuple[str, str]
    sides: Mapping[int, tuple[Side, Side]]


def comparisons(outcomes: Sequence[Outcome]) -> tuple[list[Comparison], list[str]]:
    """Compare what a bench has measured.

    Every variation is compared with the first of its recipe, in the regime that the recipe trains; that regime with
    `local` and `centralized`; and every recipe with the first one, where both are made of the same data.

    Returns:
        The comparisons, and what could not be compared, a sentence each.
    """
    groups: dict[tuple[str, str], dict[int, _Kept]] = {}
    for one in outcomes:
        if one.summary:
            groups.setdefault((one.cell.name, one.cell.label), {})[one.cell.seed] = _kept(one)
    found, refused = list[Comparison](), list[str]()
    recipes, apart = _recipes(groups)
    for plan in (*_variations(groups), *_regimes(groups), *recipes):
        if not plan.sides:
            refused.append(f"{plan.where}: {plan.names[0]} and {plan.names[1]} have no seed in common")
        for evaluator in evaluators(*(one for both in plan.sides.values() for one in both)):
            reasons = {seed: why_not(*both, evaluator, plan.names) for seed, both in plan.sides.items()}
            refused += _told(f"{plan.where}, {evaluator}, {plan.names[1]} against {plan.names[0]}: ", reasons)
            kept = {seed: both for seed, both in plan.sides.items() if not reasons[seed]}
            found += [_compare(plan, evaluator, kept)] if kept else []
    return _adjusted(found), refused + apart


def _kept(outcome: Outcome) -> _Kept:
    run = read(outcome.cell.folder)
    return _Kept({name: side(run, name) for name in run.regimes}, compare.flat({"data": run.recipe.get("data") or {}}))


def _own(runs: _Runs) -> dict[int, Side]:
    return {seed: next(iter(one.sides.values())) for seed, one in runs.items()}


def _both(a: Mapping[int, Side], b: Mapping[int, Side]) -> dict[int, tuple[Side, Side]]:
    return {seed: (one, b[seed]) for seed, one in a.items() if seed in b}


def _variations(groups: Mapping[tuple[str, str], _Runs]) -> Iterator[_Plan]:
    for recipe, pairs in groupby(groups.items(), key=lambda pair: pair[0][0]):
        ((_, first), base), *others = pairs
        for (_, label), runs in others:
            yield _Plan(VARIATIONS, recipe, (first, label), _both(_own(base), _own(runs)))


def _regimes(groups: Mapping[tuple[str, str], _Runs]) -> Iterator[_Plan]:
    for (recipe, label), runs in groups.items():
        own, *others = dict.fromkeys(name for one in runs.values() for name in one.sides)
        for other in others:
            beside = {seed: one.sides[other] for seed, one in runs.items() if other in one.sides}
            yield _Plan(REGIMES, f"{recipe}, {label}", (other, own), _both(beside, _own(runs)))


def _recipes(groups: Mapping[tuple[str, str], _Runs]) -> tuple[list[_Plan], list[str]]:
    """Return the recipes to compare, variation by variation, and which are made of other data."""
    plans, apart = list[_Plan](), list[str]()
    firsts: dict[str, tuple[str, _Runs]] = {}
    for (recipe, label), runs in groups.items():
        first, base = firsts.setdefault(label, (recipe, runs))
        if first == recipe:
            continue
        data, other = (next(iter(one.values())).data for one in (base, runs))
        odd = [key for key in dict.fromkeys([*data, *other]) if data.get(key) != other.get(key)]
        if odd:
            apart.append(f"{label}: {first} and {recipe} have other data ({', '.join(odd)} differ)")
        else:
            plans.append(_Plan(RECIPES, label, (first, recipe), _both(_own(base), _own(runs))))
    return plans, apart


def _told(where: str, reasons: Mapping[int, str]) -> list[str]:
    """Return each reason once, with its seeds where others have another one or none."""
    lines = []
    for why in dict.fromkeys(filter(None, reasons.values())):
        seeds = [str(seed) for seed, one in reasons.items() if one == why]
        at = f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}: " if len(seeds) < len(reasons) else ""
        lines.append(f"{where}{at}{why}")
    return lines


def _compare(plan: _Plan, evaluator: str, sides: Mapping[int, tuple[Side, Side]]) -> Comparison:
    scores: dict[tuple[str, str], list[tuple[float, float]]] = {}
    seeds = []
    for seed, (first, second) in sides.items():
        a, b = first.items[evaluator], second.items[evaluator]
        alone = compare.pair(a, b)
        seeds.append(AtSeed(seed, alone.difference.mean, alone.p, alone.items))
        for name, item in a.items():
            scores.setdefault((item.stratum, name), []).append((item.score, b[name].score))
    means = np.array([np.mean(found, axis=0) for found in scores.values()])
    gap = stats.paired_bootstrap(means[:, 1], means[:, 0], [stratum for stratum, _ in scores])
    first_name, second_name = plan.names
    return Comparison(
        plan.group, plan.where, evaluator, first_name, second_name, gap.mean, gap.low, gap.high, len(scores), seeds
    )


def _adjusted(found: Sequence[Comparison]) -> list[Comparison]:
    """Adjust the p-values of all comparisons and seeds for their number."""
    p = iter(stats.holm([at.p for one in found for at in one.seeds if at.p is not None]))
    return [replace(one, seeds=[at if at.p is None else replace(at, p=next(p)) for at in one.seeds]) for one in found]
