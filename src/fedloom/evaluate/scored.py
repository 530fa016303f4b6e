"""From the scores of answers to items, and from items to the primary metric with its interval.

A score is an answer's contribution to its evaluator's primary metric, which over one adapter is the mean over strata
of the mean over items of the mean over an item's answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from fedloom.evaluate.base import Sample
from fedloom.evaluate.stats import Interval, bootstrap, macro_mean, wilson


@dataclass(frozen=True, slots=True)
class Answered:
    """One scored answer to an item; `prompt` is its prompt's hash, "" where that does not matter."""

    id: str
    score: float
    stratum: str = ""
    prompt: str = ""


@dataclass(frozen=True, slots=True)
class Item:
    """An item and how well it was answered.

    Attributes:
        prompt: hash of its prompt.
        score: mean over its answers: samples and clients.
        stratum: the category, task or subject whose mean counts once; "" where there is one.
        right: whether its only answer is right; None: there are several, or it is graded.
    """

    prompt: str
    score: float
    stratum: str
    right: bool | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A primary metric with its 95 % interval, and how that was found."""

    interval: Interval
    method: str


def items(answers: Iterable[Answered]) -> dict[str, Item]:
    """Return item -> its score over all its answers."""
    found: dict[str, list[Answered]] = {}
    for one in answers:
        found.setdefault(one.id, []).append(one)
    return {name: _item(ones) for name, ones in found.items()}


def answered(samples: Iterable[Sample]) -> list[Answered]:
    """Return the samples that have a score."""
    return [Answered(one.id, one.score, one.stratum) for one in samples if one.score is not None]


def primary(items: Mapping[str, Item]) -> float:
    """Return the mean over strata of the mean over items (at least one)."""
    return macro_mean([one.score for one in items.values()], [one.stratum for one in items.values()])


def estimate(items: Mapping[str, Item]) -> Estimate | None:
    """Return the primary metric over items with its interval.

    Wilson's for a share of right answers; for macro means and graded scores a bootstrap over items within strata.
    None: there is no item, or resampling cannot tell, since a stratum has one item or no item differs from another.
    """
    scores, strata = [one.score for one in items.values()], [one.stratum for one in items.values()]
    if not scores:
        return None
    if len(set(strata)) == 1 and all(one.right is not None for one in items.values()):
        return Estimate(Interval(primary(items), *wilson(round(sum(scores)), len(scores))), "Wilson")
    found = bootstrap(scores, strata)
    if min(strata.count(one) for one in set(strata)) < 2 or found.low == found.high:
        return None
    return Estimate(found, "bootstrap over items" + (" within strata" if len(set(strata)) > 1 else ""))


def _item(answers: list[Answered]) -> Item:
    first, score = answers[0], float(np.mean([one.score for one in answers]))
    right = bool(score) if len(answers) == 1 and score in (0, 1) else None
    return Item(first.prompt, score, first.stratum, right)
