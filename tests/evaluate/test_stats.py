from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from fedloom.evaluate.stats import (
    client_bootstrap,
    holm,
    macro_mean,
    mcnemar,
    paired_bootstrap,
    variance,
    wilson,
    worst_share,
)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (2, 100), (50, 200), (53, 1319)])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_wilson_equals_scipy(successes: int, n: int, level: float) -> None:
    expected = binomtest(successes, n).proportion_ci(confidence_level=level, method="wilson")
    assert wilson(successes, n, level) == pytest.approx((expected.low, expected.high), abs=1e-14)


def test_wilson_by_hand_and_its_limits() -> None:
    # z = 1.959964: (0.5 + 0.1920729 -+ 1.959964 sqrt(0.025 + 0.0096036)) / 1.3841459
    assert wilson(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    assert wilson(0, 12)[0] == 0.0  # where the formula itself gives 2e-17
    assert wilson(11, 11)[1] == 1.0  # and 1 + 2e-16


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match=rf"{successes} successes of {n} items"):
        wilson(successes, n)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_levels_are_shares(level: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        wilson(1, 2, level)
    with pytest.raises(ValueError, match="between 0 and 1"):
        paired_bootstrap([1.0], [0.0], ["x"], level=level)


def test_bootstrap_of_a_constant_difference_has_no_width() -> None:
    b = np.array([0.25, 0.5, 3.0, 4.0])
    found = paired_bootstrap(b + 0.5, b, ["x", "x", "y", "y"], draws=50)
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)


def test_bootstrap_weighs_strata_equally_whatever_their_size() -> None:
    a, b, strata = [1.0] * 9 + [0.0], [0.0] * 10, ["large"] * 9 + ["small"]
    found = paired_bootstrap(a, b, strata, draws=20)
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)  # each stratum is constant: no width either
    mixed = paired_bootstrap(a, b, ["one"] * 10, draws=2000)
    assert mixed.mean == pytest.approx(0.9)
    assert mixed.low < 0.9 < mixed.high


def test_bootstrap_of_right_and_wrong_has_the_binomial_quantiles() -> None:
    # resamples of k ones among n are Binomial(n, k / n) / n, whose quantiles are known
    n, k = 100, 30
    found = paired_bootstrap([1] * k + [0] * (n - k), [0] * n, [0] * n, draws=20_000)
    assert (found.low, found.high) == pytest.approx((0.21, 0.39), abs=0.0101)


def test_bootstrap_standard_error_of_graded_scores() -> None:
    values = np.arange(400) / 400
    found = paired_bootstrap(values, np.zeros(400), [0] * 400, draws=5000, level=0.6826895)
    assert (found.high - found.low) / 2 == pytest.approx(values.std() / 20, rel=0.05)


def test_bootstrap_is_paired_antisymmetric_and_a_function_of_its_seed() -> None:
    rng = np.random.default_rng(0)
    a, strata = rng.random(60), ["x", "y", "z"] * 20
    assert paired_bootstrap(a, a, strata, draws=100).high == 0.0  # unpaired resamples would differ
    b = rng.random(60)
    ab, again, other = (paired_bootstrap(a, b, strata, draws=100, seed=seed) for seed in (0, 0, 1))
    assert ab == again
    assert ab.low != other.low
    assert paired_bootstrap(b, a, strata, draws=100).mean == pytest.approx(-ab.mean)


def test_bootstrap_does_not_depend_on_how_draws_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = [1, 0, 1, 1, 0, 0, 1], [0, 0, 1, 0, 1, 0, 0]
    whole = paired_bootstrap(a, b, [0, 0, 0, 0, 1, 1, 1], draws=101)
    monkeypatch.setattr("fedloom.evaluate.stats._CHUNK", 10)
    assert paired_bootstrap(a, b, [0, 0, 0, 0, 1, 1, 1], draws=101) == whole


@pytest.mark.parametrize(
    ("a", "b", "strata", "message"),
    [
        ([1.0, 0.0], [1.0], ["x", "x"], "same items"),
        ([1.0, 0.0], [1.0, 0.0], ["x"], "1 strata for 2 items"),
        ([], [], [], "at least one number"),
        ([1.0, float("nan")], [0.0, 0.0], ["x", "x"], "1 values that are not finite"),
    ],
)
def test_bootstrap_refuses_what_is_not_paired(a: list[float], b: list[float], strata: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(a, b, strata)


@pytest.mark.parametrize(("only_a", "only_b"), [(1, 0), (5, 0), (0, 8), (3, 9), (7, 7), (40, 61)])
def test_mcnemar_equals_the_binomial_test(only_a: int, only_b: int) -> None:
    a = [1] * only_a + [0] * only_b + [1, 1, 0]
    b = [0] * only_a + [1] * only_b + [1, 1, 0]
    expected = binomtest(only_a, only_a + only_b).pvalue
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-12)
    assert mcnemar(b, a) == mcnemar(a, b)


def test_mcnemar_by_hand() -> None:
    assert mcnemar([1, 1, 1, 1, 1], [0, 0, 0, 0, 0]) == pytest.approx(2 / 32)
    assert mcnemar([1, 0, 1], [1, 0, 1]) == 1.0
    assert mcnemar([True, False], [False, True]) == 1.0


def test_mcnemar_refuses_graded_scores() -> None:
    with pytest.raises(ValueError, match="use paired_bootstrap"):
        mcnemar([0.5, 1.0], [0.0, 1.0])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_holm_refuses_what_is_no_probability() -> None:
    with pytest.raises(ValueError, match=r"within \[0, 1\]"):
        holm([0.1, float("nan")])


def test_worst_share_follows_the_metric_direction() -> None:
    values = list(range(30))
    assert worst_share(values, higher_is_better=True) == 1.0  # 0, 1, 2
    assert worst_share(values, higher_is_better=False) == 28.0  # 27, 28, 29
    assert worst_share([3.0, 1.0, 2.0], higher_is_better=True) == 1.0  # at least one
    assert worst_share([3.0, 1.0, 2.0], share=1.0, higher_is_better=True) == 2.0


def test_worst_share_counts_without_rounding_errors() -> None:
    assert 0.29 * 100 < 29  # the trap
    assert worst_share(list(range(100)), share=0.29, higher_is_better=True) == 14.0  # mean of 0 .. 28


def test_worst_share_refuses_what_would_hide_a_failure() -> None:
    with pytest.raises(ValueError, match="not finite"):
        worst_share([1.0, float("nan")], higher_is_better=False)
    with pytest.raises(ValueError, match="at least one"):
        worst_share([], higher_is_better=True)
    with pytest.raises(ValueError, match="share is 0"):
        worst_share([1.0], share=0, higher_is_better=True)


def test_variance_is_that_of_the_population() -> None:
    assert variance([1.0, 3.0]) == 1.0
    assert variance([5.0]) == 0.0


def test_client_bootstrap_is_the_weighted_mean() -> None:
    found = client_bootstrap([1.0, 2.0, 4.0], [1.0, 1.0, 2.0])
    assert found.mean == pytest.approx(11 / 4)
    assert found.low == 1.0 and found.high == 4.0  # all three the same client: 1 draw of 27
    assert client_bootstrap([1.0, 2.0, 4.0], [1.0, 1.0, 2.0]) == found
    values = np.random.default_rng(0).normal(size=400)
    equal = client_bootstrap(values, np.ones(400), level=0.6826895)
    assert equal.high - equal.mean == pytest.approx(values.std() / 20, rel=0.05)
    with pytest.raises(ValueError, match="a weight is 0; needed: above 0"):
        client_bootstrap([1.0, 2.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="needed: the same items"):
        client_bootstrap([1.0, 2.0], [1.0])


def test_macro_mean_by_hand() -> None:
    assert macro_mean([1.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"]) == pytest.approx((1 / 3 + 1) / 2)
    with pytest.raises(ValueError, match="macro_mean: 1 strata for 2 items"):
        macro_mean([1.0, 0.0], ["a"])
