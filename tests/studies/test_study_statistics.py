"""Mean, deviation, intervals and verdicts."""

import math

import numpy as np
import pytest
import scipy.stats

from bvae.studies.statistics import compare, mean_sd, t_central, t_quantile


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 9, 30, 101])
def test_t_agrees_with_scipy(df: int) -> None:
    for confidence in (0.5, 0.9, 0.95, 0.999):
        assert t_quantile(confidence, df) == pytest.approx(scipy.stats.t.ppf((1 + confidence) / 2, df), rel=1e-9)
    for t in (0.0, 0.3, 2.0, 40.0):
        assert t_central(t, df) == pytest.approx(2 * scipy.stats.t.cdf(t, df) - 1, abs=1e-12)


def test_mean_and_deviation_of_what_is_there() -> None:
    values = [3.0, None, 5.5, math.nan, 4.25]
    mean, sd, n = mean_sd(values)
    there = np.array([3.0, 5.5, 4.25])
    assert (mean, sd, n) == (pytest.approx(there.mean()), pytest.approx(there.std(ddof=1)), 3)
    assert mean_sd([7.0]) == (7.0, None, 1)
    assert mean_sd([None]) == (None, None, 0)


def test_the_interval_is_that_of_a_paired_test() -> None:
    rng = np.random.default_rng(0)
    b = rng.normal(60, 5, 6)  # seeds differ far more than the rows do
    a = b - 1 + rng.normal(0, 0.3, 6)
    found = compare("a", "b", "rec", list(a), list(b), 2.0)
    low, high = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.verdict.startswith("lower by") and "less than the 2 that matter" in found.verdict


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([-5.0, -5.2, -4.8], "lower by 5, by more than the 2 that matter: 95 % interval -5.5 to -4.5, 3 seeds"),
        ([5.0, 5.2, 4.8], "higher by 5, by more than the 2 that matter: 95 % interval +4.5 to +5.5, 3 seeds"),
        ([-2.0, -2.4, -1.6], "lower by 2, perhaps by less than the 2 that matter"),
        ([0.1, -0.1, 0.0], "no difference seen, and none of 2 or more: 95 % interval"),
        ([4.0, -3.0, 1.0], "no difference seen: 95 % interval -8.06 to +9.39, 3 seeds"),
    ],
)
def test_verdicts(differences: list[float], verdict: str) -> None:
    b = [50.0, 60.0, 55.0]
    a = [y + d for y, d in zip(b, differences, strict=True)]
    assert compare("a", "b", "rec", a, b, 2.0).verdict.startswith(verdict)


def test_two_seeds_show_both_values_and_no_verdict() -> None:
    found = compare("a", "b", "rec", [10.0, 12.0], [30.0, 31.0], 2.0)
    assert found.low is None
    assert found.verdict == "no verdict from 2 seed(s): seed 0: 10 against 30; seed 1: 12 against 31"


def test_seeds_are_paired_and_excluded_ones_left_out() -> None:
    a, b = [1.0, None, 3.0, 4.0, 9.0], [2.0, 2.0, 4.0, 5.0, 1.0]
    found = compare("a", "b", "rec", a, b, None, excluded=[4])
    assert [seed for seed, _, _ in found.pairs] == [0, 2, 3]
    assert found.difference == -1
    assert compare("a", "b", "rec", a, b, excluded=range(5)).verdict == "not compared: gamma not settled"
    assert compare("a", "b", "rec", [None], [1.0]).verdict == "not measured in both"
