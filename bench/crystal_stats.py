"""Losses of a few seeds -> means with 95 % intervals by Student's t, p-values, and Holm's correction of many of them.

scipy would have all of it; three formulas are not worth a dependency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
_TINY, _CLOSE, _MOST_TERMS = 1e-300, 1e-15, 10_000


@dataclass(frozen=True)
class Interval:
    """The mean of n values and half its interval; half and p are None of a single value, which has none.

    p: how likely a mean at least so far from 0 is where the true one is 0 (two-sided).
    """

    mean: float
    half: float | None
    n: int
    p: float | None

    @property
    def sign(self) -> int:
        """1 above 0, -1 below, 0 where the interval holds 0 or there is none."""
        if self.half is None or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1


def interval(values: Sequence[float]) -> Interval:
    """mean +- t sd / sqrt(n), t the quantile with n - 1 degrees of freedom."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, None, n, None)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    if error == 0:
        return Interval(mean, 0.0, n, 1.0 if mean == 0 else 0.0)
    return Interval(mean, t_quantile(0.5 + CONFIDENCE / 2, n - 1) * error, n, two_sided_p(mean / error, n - 1))


def two_sided_p(t: float, df: int) -> float:
    """P(|T| >= |t|) for Student's T: the incomplete beta function I(df/2, 1/2) at df / (df + t^2)."""
    return _incomplete_beta(df / 2, 0.5, df / (df + t * t))


def t_quantile(p: float, df: int) -> float:
    """The t with P(T <= t) = p, for 0.5 <= p < 1, by bisection."""
    low, high = 0.0, 1.0
    while 1 - two_sided_p(high, df) / 2 < p:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        if 1 - two_sided_p(middle, df) / 2 < p:
            low = middle
        else:
            high = middle
    return high


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values so raised that all of them together are below a level by chance no more often than one alone.

    Source: Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    raised, largest = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        raised[i] = largest
    return raised


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (Abramowitz and Stegun, 26.5.8)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly, that of the other side is fast
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(
        a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    ) / a  # fmt: skip
    # Lentz's method: value = 1 / (1 + d1 / (1 + d2 / (1 + ...)))
    value, c, d = 1.0, 1.0, 0.0
    for term in range(_MOST_TERMS):
        m = term // 2
        if term == 0:
            numerator = 1.0
        elif term % 2 == 0:
            numerator = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            numerator = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / _away_from_zero(1 + numerator * d)
        c = _away_from_zero(1 + numerator / c)
        value *= c * d
        if abs(1 - c * d) < _CLOSE:
            break
    return front * (value - 1)


def _away_from_zero(x: float) -> float:
    return x if abs(x) > _TINY else _TINY
