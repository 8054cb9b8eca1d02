"""Mean, deviation, Student's t interval, and the verdict on two rows that were trained with the same seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MIN_FID_DIFFERENCE = 2.0
"""The smallest difference of FIDs that matters, set before anything was measured."""
CONFIDENCE = 0.95

Values = Sequence[float | None]


def finite(values: Values) -> list[float]:
    return [v for v in values if v is not None and math.isfinite(v)]


def mean_sd(values: Values) -> tuple[float | None, float | None, int]:
    """(mean, standard deviation with n-1, n) of the finite values; None where there are too few for it."""
    found = finite(values)
    n = len(found)
    if not n:
        return None, None, 0
    mean = math.fsum(found) / n
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in found) / (n - 1)) if n > 1 else None, n


def t_central(t: float, df: int) -> float:
    """P(|T| < t) of Student's t with `df` degrees of freedom, by the finite sums of Abramowitz & Stegun 26.7.3-4."""
    if df < 1:
        raise ValueError(f"degrees of freedom must be at least 1, not {df}")
    theta = math.atan(t / math.sqrt(df))
    sin, cos = math.sin(theta), math.cos(theta)
    # Terms cos^p * (2*4*..)/(3*5*..) for odd df, cos^p * (1*3*..)/(2*4*..) for even df, p up to df - 2.
    power = df % 2
    term = cos if power else 1.0
    total = 0.0
    while power <= df - 2:
        total += term
        term *= cos * cos * (power + 1) / (power + 2)
        power += 2
    return 2 / math.pi * (theta + sin * total) if df % 2 else sin * total


def t_quantile(confidence: float, df: int) -> float:
    """The t for which P(|T| < t) = confidence, 0 < confidence < 1, by bisection over atan(t)."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, not {confidence}")
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        if t_central(math.tan(middle), df) < confidence:
            low = middle
        else:
            high = middle
    return math.tan((low + high) / 2)


@dataclass(frozen=True)
class Comparison:
    """Two rows by one metric, paired by seed; `difference` is the mean of row minus other, lower is better."""

    row: str
    other: str
    metric: str
    pairs: tuple[tuple[int, float, float], ...]
    """(seed, row's value, other's value)"""
    difference: float | None
    low: float | None
    high: float | None
    """the 95 % interval of the difference; None below three pairs"""
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "row": self.row,
            "other": self.other,
            "metric": self.metric,
            "seeds": [seed for seed, _, _ in self.pairs],
            "difference": self.difference,
            "interval": None if self.low is None else [self.low, self.high],
            "verdict": self.verdict,
        }


def compare(
    row: str, other: str, metric: str, a: Values, b: Values, matters: float | None = None, excluded: Sequence[int] = ()
) -> Comparison:
    """Compares row `a` with `b`, values by seed.

    Args:
        matters: the smallest difference that matters; None where none was set.
        excluded: seeds whose values are not to be compared, since a gamma had not settled.
    """
    pairs = tuple(
        (seed, x, y)
        for seed, (x, y) in enumerate(zip(a, b, strict=False))
        if seed not in excluded and x is not None and y is not None and math.isfinite(x) and math.isfinite(y)
    )
    differences = [x - y for _, x, y in pairs]
    mean, sd, n = mean_sd(differences)
    if n == 0:
        why = "not compared: gamma not settled" if excluded else "not measured in both"
        return Comparison(row, other, metric, pairs, None, None, None, why)
    assert mean is not None
    if n < 3:
        both = "; ".join(f"seed {seed}: {x:.4g} against {y:.4g}" for seed, x, y in pairs)
        return Comparison(row, other, metric, pairs, mean, None, None, f"no verdict from {n} seed(s): {both}")
    assert sd is not None
    half = t_quantile(CONFIDENCE, n - 1) * sd / math.sqrt(n)
    low, high = mean - half, mean + half
    return Comparison(row, other, metric, pairs, mean, low, high, _verdict(mean, low, high, n, matters))


def _verdict(mean: float, low: float, high: float, n: int, matters: float | None) -> str:
    interval = f"95 % interval {low:+.3g} to {high:+.3g}, {n} seeds"
    if low <= 0 <= high:
        if matters is not None and -matters < low and high < matters:
            return f"no difference seen, and none of {matters:g} or more: {interval}"
        return f"no difference seen: {interval}"
    word = "lower" if mean < 0 else "higher"
    least = min(abs(low), abs(high))
    if matters is None or least >= matters:
        size = "" if matters is None else f", by more than the {matters:g} that matter"
    elif max(abs(low), abs(high)) < matters:
        size = f", by less than the {matters:g} that matter"
    else:
        size = f", perhaps by less than the {matters:g} that matter"
    return f"{word} by {abs(mean):.3g}{size}: {interval}"
