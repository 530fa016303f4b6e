"""Uncertainty and fairness: intervals, paired tests, and how the worst-off clients fare.

One accuracy: `wilson`. Two models on the same items: `mcnemar` for right and wrong, `paired_bootstrap` for the size of
the difference. Several comparisons at once: `holm`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, ndtri

from fedloom import seeds

_CHUNK = 2**20  # numbers drawn at once: 8 MB


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the score interval of a proportion, which keeps its coverage for few items and rates near 0 or 1.

    With p = successes / n and z the (1 + level) / 2 quantile of the normal distribution:

        (p + z^2 / 2n  -+  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Source: E. B. Wilson, JASA 22 (1927), 209-212.

    Args:
        successes: items that are right, 0 to `n`.
        n: items, at least 1.
        level: confidence, between 0 and 1.

    Returns:
        The lower and the upper end, within [0, 1].

    Raises:
        ValueError: an argument is out of its range.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"wilson: {successes} successes of {n} items; needed: 0 <= successes <= n and n >= 1")
    z = float(ndtri((1 + _level(level)) / 2))
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # at p = 0 and p = 1 the end is exact, and rounding must not push it out of [0, 1]
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    strata: Sequence[object],
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return the macro-averaged difference a - b on the same items, with its percentile bootstrap interval.

    With d_i = a_i - b_i and S strata:   D = (1 / S) sum_s mean(d_i : i in stratum s).
    Each draw resamples every stratum's items with replacement, keeping its size; the interval ends at the
    (1 - level) / 2 and (1 + level) / 2 quantiles of the draws' D.
    Source: B. Efron, R. J. Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 and 13.

    Args:
        a, b: scores [n] of the two models; entry i of both belongs to item i.
        strata: the stratum of each item [n], such as its category; one value for all gives the plain mean.
        draws: bootstrap draws.
        seed: equal seeds give equal intervals.
        level: confidence, between 0 and 1.

    Raises:
        ValueError: lengths differ, there is no item, or a score is not finite.
    """
    differences = _finite("paired_bootstrap: a", a) - _finite("paired_bootstrap: b", b, like=a)
    return bootstrap(differences, strata, draws, seed, level)


def bootstrap(
    values: ArrayLike, strata: Sequence[object], draws: int = 10_000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Return the macro average of values with its percentile bootstrap interval, as `paired_bootstrap` has it.

    Args:
        values: one of each item [n].
        strata: the stratum of each item [n]; one value for all gives the plain mean.
        draws: bootstrap draws.
        seed: equal seeds give equal intervals.
        level: confidence, between 0 and 1.

    Raises:
        ValueError: lengths differ, there is no item, or a value is not finite.
    """
    groups = _groups("bootstrap", values, strata)
    rng = seeds.numpy_generator(seed, None, None, "bootstrap")
    total = np.zeros(draws)
    for group in groups:
        total += _resampled_means(group, draws, rng)
    tail = (1 - _level(level)) / 2
    low, high = np.quantile(total / len(groups), [tail, 1 - tail])
    return Interval(float(np.mean([np.mean(group) for group in groups])), float(low), float(high))


def macro_mean(values: ArrayLike, strata: Sequence[object]) -> float:
    """Return the mean over strata of the strata's means: (1 / S) sum_s mean(x_i : i in stratum s).

    Args:
        values: one of each item [n].
        strata: the stratum of each item [n]; one value for all gives the plain mean.

    Raises:
        ValueError: lengths differ, there is no item, or a value is not finite.
    """
    return float(np.mean([np.mean(group) for group in _groups("macro_mean", values, strata)]))


def client_bootstrap(
    values: ArrayLike, weights: ArrayLike, draws: int = 10_000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Return the weighted mean over clients with its percentile bootstrap interval.

        M = sum_c w_c x_c / sum_c w_c

    Each draw resamples clients with replacement, their weights with them, so the interval tells of other clients of
    the same kind, not of other items.

    Args:
        values: one metric of every client [n].
        weights: above 0 [n], such as the tokens that a client's loss is a mean over.
        draws: bootstrap draws.
        seed: equal seeds give equal intervals.
        level: confidence, between 0 and 1.

    Raises:
        ValueError: lengths differ, there is no client, a value is not finite, or a weight is not above 0.
    """
    x, w = _finite("client_bootstrap: values", values), _finite("client_bootstrap: weights", weights, like=values)
    if (w <= 0).any():
        raise ValueError(f"client_bootstrap: a weight is {w.min():g}; needed: above 0")
    rng, size = seeds.numpy_generator(seed, None, None, "bootstrap of clients"), len(x)
    chunk, means = max(1, _CHUNK // size), []
    for start in range(0, draws, chunk):
        drawn = rng.integers(size, size=(min(chunk, draws - start), size))
        means.append((x * w)[drawn].sum(1) / w[drawn].sum(1))
    tail = (1 - _level(level)) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float((x * w).sum() / w.sum()), float(low), float(high))


def _groups(what: str, values: ArrayLike, strata: Sequence[object]) -> list[NDArray[np.float64]]:
    """Return the values of each stratum."""
    numbers = _finite(f"{what}: values", values)
    if len(strata) != len(numbers):
        raise ValueError(f"{what}: {len(strata)} strata for {len(numbers)} items; needed: one an item")
    groups: dict[object, list[float]] = {}
    for stratum, value in zip(strata, numbers.tolist(), strict=True):
        groups.setdefault(stratum, []).append(value)
    return [np.array(group) for group in groups.values()]


def _resampled_means(values: NDArray[np.float64], draws: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the means [draws] of resamples of `values`.

    How often each distinct value occurs in a resample is multinomial; right or wrong makes three distinct differences,
    so a resample of any size costs three numbers.
    """
    distinct, counts = np.unique(values, return_counts=True)
    size, chunk = len(values), max(1, _CHUNK // len(distinct))
    means = [
        rng.multinomial(size, counts / size, size=min(chunk, draws - start)) @ distinct / size
        for start in range(0, draws, chunk)
    ]
    return np.concatenate(means)


def mcnemar(a: ArrayLike, b: ArrayLike) -> float:
    """Return the exact two-sided p-value of the hypothesis that both models are right equally often.

    Only the n items on which they disagree count; under the hypothesis the number k of those that `a` has right is
    Binomial(n, 1/2):   p = min(1, 2 P(X <= min(k, n - k))),   and p = 1 for n = 0.
    Source: Q. McNemar, Psychometrika 12 (1947), 153-157; exact form by the binomial test.

    Args:
        a, b: right (1) or wrong (0) [n] for each item; entry i of both belongs to item i.

    Raises:
        ValueError: lengths differ, there is no item, or an entry is neither 0 nor 1.
    """
    first, second = _finite("mcnemar: a", a), _finite("mcnemar: b", b, like=a)
    if not np.isin([first, second], (0, 1)).all():
        raise ValueError("mcnemar: entries must be 0 or 1; use paired_bootstrap for graded scores")
    only_a, only_b = int(np.sum(first > second)), int(np.sum(first < second))
    disagreed = only_a + only_b
    return min(1.0, 2 * float(bdtr(min(only_a, only_b), disagreed, 0.5))) if disagreed else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number, which bound the chance of any false finding.

    With p_(1) <= ... <= p_(m):   adjusted p_(i) = max over j <= i of min(1, (m - j + 1) p_(j)).
    Source: S. Holm, Scandinavian Journal of Statistics 6 (1979), 65-70.

    Args:
        p_values: one for each comparison.

    Returns:
        The adjusted values, in the order given.

    Raises:
        ValueError: a value is not within [0, 1].
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"holm: p-values must be within [0, 1], got {list(p_values)}")
    adjusted, floor, m = [0.0] * len(p_values), 0.0, len(p_values)
    for rank, i in enumerate(sorted(range(m), key=p_values.__getitem__)):
        adjusted[i] = floor = max(floor, min(1.0, (m - rank) * p_values[i]))
    return adjusted


def worst_share(values: ArrayLike, share: float = 0.1, *, higher_is_better: bool) -> float:
    """Return the mean over the worst-off clients: the worst floor(share n) of n values, and at least one.

    Source: the tail measure of fair federated learning, T. Li et al., arXiv 1905.10497.

    Args:
        values: one metric of every client [n].
        share: the part of the clients that counts, above 0 and at most 1.
        higher_is_better: True for a score such as accuracy, False for a loss.

    Raises:
        ValueError: there is no value, a value is not finite, or the share is out of its range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"worst_share: share is {share}; allowed: above 0, at most 1")
    ordered = np.sort(_finite("worst_share: values", values))
    # 0.29 * 100 is 28.999...: the count must not depend on how the share is rounded
    count = max(1, math.floor(share * len(ordered) + 1e-9))
    return float(np.mean(ordered[:count] if higher_is_better else ordered[-count:]))


def variance(values: ArrayLike) -> float:
    """Return the population variance of one metric over clients: (1 / n) sum (x_i - mean)^2.

    Source: the fairness measure of T. Li et al., arXiv 1905.10497, definition 1.

    Args:
        values: one metric of every client [n].

    Raises:
        ValueError: there is no value, or a value is not finite.
    """
    return float(np.var(_finite("variance: values", values)))


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; allowed: between 0 and 1, such as 0.95")
    return level


def _finite(what: str, values: ArrayLike, like: ArrayLike | None = None) -> NDArray[np.float64]:
    """Return finite values [n >= 1] as float64, as many as `like` has."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{what} must be a list of at least one number, got the shape {array.shape}")
    if like is not None and array.shape != np.shape(like):
        raise ValueError(f"{what} has {len(array)} items, the other has {np.shape(like)[0]}; needed: the same items")
    if not np.isfinite(array).all():
        raise ValueError(f"{what} has {int((~np.isfinite(array)).sum())} values that are not finite")
    return array
