"""Arrays of float64 -> the values of elementary functions to about 2**-90 of themselves, as sums high + low of float64.

exp is a Taylor series of 24 terms in pairs of float64 (Dekker, 1971), after a reduction with ln 2 in three parts; log
is a step of Newton's on it; GELU, tanh, sigmoid and pow follow from the two; erf is a Taylor series around the nearest
of a row of centres; sin and cos are Taylor series after a reduction with pi/2 in three parts. Angles beyond 2**29 and
roots are the C library's of numpy's long double, 64 bits on x86, right to about 2**-11 ulp of a float64. None of it is
code of crystal/ but fma and the constants; `check` compares with mpmath.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
from cllm_spheres_bench import functions_pairs as P
from cllm_spheres_bench.functions_pairs import Pair, Scaled

from cllm_spheres.crystal.functions.reals import ln2, parts, pi, root

LD = np.longdouble
LN2 = parts(ln2(), 3)
EXP_TERMS = 24
ERF_STEP, ERF_TERMS, ERF_END = 0.0625, 24, 6.0


def is_wide() -> bool:
    """Whether long double has x86's 64 bits."""
    return bool(np.finfo(LD).nmant == 63)


TAYLOR = tuple(Fraction(1, math.factorial(k)) for k in range(EXP_TERMS))


def _exp_parts(x: np.ndarray, rest: np.ndarray) -> tuple[np.ndarray, Pair]:
    """(n, m) with exp(x + rest) = m 2**n, for |x| < 1e5."""
    n, r, r_rest = np.empty(x.size), np.empty(x.size), np.empty(x.size)
    P.reduce(x, rest, 1 / math.log(2), *LN2, n, r, r_rest)
    return n, P.call(P.polynomial, *P.coefficients(TAYLOR), r, r_rest)


def _exp(x: np.ndarray, rest: np.ndarray | None = None) -> Scaled:
    """Far out it is that of -1,400 or 1,400: zero or infinite."""
    n, m = _exp_parts(np.clip(x, -1400, 1400), np.zeros(x.size) if rest is None else rest)
    return *m, n


def _log(x: np.ndarray) -> Pair:
    """y + (x e**-y - 1) - (...)**2/2 with y = log x of numpy's; near 1 the series in x - 1."""
    ordinary = (x > 0) & (x < np.inf)
    mantissa, n = np.frexp(np.where(ordinary, x, 1.0))
    low = mantissa < math.sqrt(0.5)
    mantissa, n = np.where(low, 2 * mantissa, mantissa), np.where(low, n - 1, n)
    y = np.log(mantissa)
    e = P.scaled(*_exp_parts(-y, np.zeros(x.size)))
    zeros = np.zeros(x.size)
    t, t_rest = P.add_number(P.call(P.multiply, mantissa, zeros, *e), -1.0)
    t_rest = t_rest - t * t / 2
    f = mantissa - 1
    small = np.abs(f) < 2.0**-16
    series = P.call(P.polynomial, *P.coefficients(tuple(Fraction((-1) ** k, k + 1) for k in range(8))), f, zeros)
    series = P.call(P.multiply, *series, f, zeros)
    high, rest = np.where(small, series[0], y), np.where(small, series[1], 0.0)
    high, rest = P.call(P.add, high, rest, np.where(small, 0.0, t), np.where(small, 0.0, t_rest))
    whole = P.call(P.multiply, n.astype(np.float64), zeros, *P.of_number(ln2(), x))
    high, rest = P.call(P.add, *whole, high, rest)
    edge = np.where(x > 0, np.inf, np.where(x == 0, -np.inf, np.nan))
    return np.where(ordinary, high, edge), np.where(ordinary, rest, 0.0)


def _tanh(x: np.ndarray) -> Pair:
    """(e - 1) / (e + 1) with e = exp(2|x|); below 2**-10 the series."""
    t = np.minimum(np.abs(x), 30.0)
    e = P.scaled(*_exp_parts(2 * t, 0 * t))
    large = P.call(P.divide, *P.add_number(e, -1.0), *P.add_number(e, 1.0))
    square = P.call(P.multiply, x, 0 * t, x, 0 * t)
    odd = tuple(Fraction(*c) for c in ((1, 1), (-1, 3), (2, 15), (-17, 315), (62, 2835), (-1382, 155925)))
    small = P.call(P.multiply, *P.call(P.polynomial, *P.coefficients(odd), *square), t, 0 * t)
    chosen = t < 2.0**-10
    high, rest = np.where(chosen, small[0], large[0]), np.where(chosen, small[1], large[1])
    return np.copysign(high, x), np.where(np.signbit(x), -rest, rest)


def _logistic(z: Pair) -> tuple[Pair, Pair, np.ndarray]:
    """(1 / (1 + e), m / (1 + e), n) with e = m 2**n = exp(-z), z >= 0."""
    n, m = _exp_parts(-np.minimum(z[0], 1400.0), -z[1])
    d = P.add_number(P.scaled(n, m), 1.0)
    one = np.ones(z[0].size)
    return P.call(P.divide, one, 0 * one, *d), P.call(P.divide, *m, *d), n


def _sigmoid(x: np.ndarray) -> Scaled:
    one, other, n = _logistic((np.abs(x), np.zeros(x.size)))
    return np.where(x < 0, other[0], one[0]), np.where(x < 0, other[1], one[1]), np.where(x < 0, n, 0.0)


TWICE = 2 * root(2 / pi())
CUBIC = TWICE * 44715 / 10**6


def _gelu_exponent(t: np.ndarray) -> tuple[Pair, Pair]:
    """(2u, d(2u)/dx)."""
    square = P.call(P.multiply, t, 0 * t, t, 0 * t)
    exponent = P.call(P.polynomial, *P.coefficients((TWICE, CUBIC)), *square)
    slope = P.call(P.polynomial, *P.coefficients((TWICE, 3 * CUBIC)), *square)
    return P.call(P.multiply, *exponent, t, 0 * t), slope


def _gelu(x: np.ndarray) -> Scaled:
    t = np.minimum(np.abs(x), 64.0)
    one, other, n = _logistic(_gelu_exponent(t)[0])
    below = P.call(P.multiply, *other, t, 0 * t)
    above = P.call(P.multiply, *one, t, 0 * t)
    high = np.where(x < 0, -below[0], np.where(np.abs(x) < 64, np.copysign(above[0], x), x))
    low = np.where(x < 0, -below[1], np.where(np.abs(x) < 64, above[1], 0.0))
    return high, low, np.where(x < 0, n, 0.0)


def _gelu_slope(x: np.ndarray) -> Scaled:
    t = np.minimum(np.abs(x), 64.0)
    z, slope = _gelu_exponent(t)
    one, other, n = _logistic(z)
    s = [np.where(x < 0, b, a) for a, b in zip(one, other, strict=True)]  # without 2**n where x < 0
    rest = [np.where(x < 0, a, b) for a, b in zip(one, P.scaled(n, other), strict=True)]
    p = P.call(P.multiply, *P.call(P.multiply, *rest, t, 0 * t), *slope)
    sign = np.where(x < 0, -1.0, 1.0)
    factor = P.add_number((p[0] * sign, p[1] * sign), 1.0)
    return *P.call(P.multiply, *s, *factor), np.where(x < 0, n, 0.0)


def _pow(x: np.ndarray, y: np.ndarray) -> Scaled:
    """exp(y log|x|); C's signs and special values from numpy."""
    size = np.abs(x)
    ordinary = (size > 0) & (size < np.inf) & np.isfinite(y) & (y != 0)
    log = _log(np.where(ordinary, size, 1.0))
    bounded = np.clip(np.where(ordinary, y, 1.0), -1e200, 1e200)
    exponent = P.call(P.multiply, *log, bounded, 0 * bounded)
    high, low, n = _exp(exponent[0], np.where(np.abs(exponent[0]) < 1400, exponent[1], 0.0))
    whole = np.rint(y) == y
    odd = whole & (np.rint(y / 2) != y / 2)
    sign = np.where(np.signbit(x) & odd, -1.0, 1.0)
    usual = ordinary & (whole | (x > 0))
    high, low, n = (np.where(usual, a, 0.0) for a in (sign * high, sign * low, n))
    high[~usual] = np.power(x[~usual], y[~usual])
    return high, low, n


SINE = tuple(Fraction((-1) ** k, math.factorial(2 * k + 1)) for k in range(14))
COSINE = tuple(Fraction((-1) ** k, math.factorial(2 * k)) for k in range(14))
HALF_PI = parts(pi() / 2, 3)
NEAR = 2.0**29


def _angle(x: np.ndarray, quarter: int) -> Pair:
    """sin(x + quarter pi/2): Taylor series of what is left to the nearest quarter; far away the C library's."""
    near = np.abs(x) <= NEAR
    n, r, r_rest = np.empty(x.size), np.empty(x.size), np.empty(x.size)
    P.quarters(np.where(near, x, 0.0), 2 / math.pi, *HALF_PI, n, r, r_rest)
    square = P.call(P.multiply, r, r_rest, r, r_rest)
    sine = P.call(P.multiply, *P.call(P.polynomial, *P.coefficients(SINE), *square), r, r_rest)
    cosine = P.call(P.polynomial, *P.coefficients(COSINE), *square)
    turn = (n.astype(np.int64) + quarter) & 3
    sign = np.where(turn >= 2, -1.0, 1.0)
    high, rest = (sign * np.where(turn & 1, b, a) for a, b in zip(sine, cosine, strict=True))
    if not quarter:
        high = np.where(x == 0, x, high)
    far = _wide(np.cos if quarter else np.sin)(x[~near])
    high[~near], rest[~near] = far
    return high, rest


@cache
def _erf_series(centre: float) -> Pair:
    """Coefficients of erf around a centre: derivatives by the recurrence of Hermite's polynomials."""
    with decimal.localcontext(prec=60):
        x, constant = decimal.Decimal(centre), 2 / root(pi())
        slope = decimal.Decimal(constant.numerator) / decimal.Decimal(constant.denominator) * (-x * x).exp()
        # erf itself: 2/sqrt(pi) exp(-x*x) * sum of 2**n x**(2n+1) / (2n+1)!!, all of one sign
        term, total, n = x, decimal.Decimal(0), 0
        while abs(term) > decimal.Decimal(10) ** -55:
            total += term
            n += 1
            term *= 2 * x * x / (2 * n + 1)
        coefficients, before, now = [slope * total], decimal.Decimal(0), slope
        for k in range(1, ERF_TERMS):  # now = the k-th derivative / k!; f'' = -2 x f'
            coefficients.append(now)
            before, now = now, (-2 * x * now - 2 * (k - 1) * before / k) / (k + 1)
        return P.coefficients(tuple(map(Fraction, coefficients)))


def erf_near(x: np.ndarray, centre: float) -> Pair:
    """erf of |x| within ERF_STEP / 2 of a centre, with x's sign."""
    h = np.abs(x) - centre  # exact
    c, c_rest = _erf_series(centre)
    if centre:
        high, rest = P.call(P.polynomial, c, c_rest, h, 0 * h)
    else:
        high, rest = P.call(P.multiply, *P.call(P.polynomial, c[1:], c_rest[1:], h, 0 * h), h, 0 * h)
    return np.copysign(high, x), np.where(np.signbit(x), -rest, rest)


def _erf(x: np.ndarray) -> Pair:
    """erf, one centre after the other."""
    centres = np.rint(np.minimum(np.abs(x), ERF_END) / ERF_STEP) * ERF_STEP
    high, rest = np.copysign(1.0, x), np.zeros(x.size)
    high[np.isnan(x)] = np.nan
    inside = np.abs(x) < ERF_END
    for centre in np.unique(centres[inside]):
        chosen = inside & (centres == centre)
        high[chosen], rest[chosen] = erf_near(x[chosen], float(centre))
    return high, rest


def _wide(function: Callable[..., Any]) -> Callable[[np.ndarray], Pair]:
    """A function of long doubles -> one of pairs."""

    def apply(x: np.ndarray) -> Pair:
        value = function(x.astype(LD))
        high = value.astype(np.float64)
        return high, (value - high).astype(np.float64)

    return apply


OF: dict[str, Callable[..., Pair | Scaled]] = {
    "exp": _exp, "log": _log, "tanh": _tanh, "sigmoid": _sigmoid, "gelu": _gelu, "gelu_slope": _gelu_slope,
    "sqrt": _wide(np.sqrt), "rsqrt": _wide(lambda x: 1 / np.sqrt(x)),
    "sin": lambda x: _angle(x, 0), "cos": lambda x: _angle(x, 1),
    "erf": _erf, "pow": _pow,
}  # fmt: skip


def pairs(name: str, *x: np.ndarray) -> Pair:
    """(high, low / high) of a function at float64 arguments, whose subnormals count as zeros."""
    tiny = np.finfo(np.float64).tiny
    with np.errstate(all="ignore"):
        high, low, *n = OF[name](*(np.where(np.abs(a) < tiny, np.copysign(0.0, a), a) for a in x))
        relative = low / high
        if n:
            high = P.scaled(n[0], (high, low))[0]
        if name != "pow":
            high = np.where(np.isnan(x[0]), np.nan, high)
    return high, np.where(np.isfinite(relative) & np.isfinite(high), relative, 0.0)


def check(name: str, *x: np.ndarray) -> float:
    """The reference's largest error in ulp of float64 against mpmath, where the result is a normal number."""
    import mpmath as mp

    def exponent(v: Any) -> Any:
        return 2 * mp.sqrt(2 / mp.pi) * (v + mp.mpf(44715) / 10**6 * v**3)

    def slope(v: Any) -> Any:
        s = 1 / (1 + mp.exp(-exponent(v)))
        return s + v * s * (1 - s) * 2 * mp.sqrt(2 / mp.pi) * (1 + 3 * mp.mpf(44715) / 10**6 * v**2)

    exact: dict[str, Callable[..., Any]] = {
        "exp": mp.exp, "log": mp.log, "tanh": mp.tanh, "sqrt": mp.sqrt, "sin": mp.sin, "cos": mp.cos, "erf": mp.erf,
        "pow": mp.power, "sigmoid": lambda v: 1 / (1 + mp.exp(-v)), "rsqrt": lambda v: 1 / mp.sqrt(v),
        "gelu": lambda v: v / (1 + mp.exp(-exponent(v))), "gelu_slope": slope,
    }  # fmt: skip
    high, low = pairs(name, *x)
    worst = 0.0
    digits = 450 if name in ("sin", "cos") else 400 if name == "gelu_slope" else 60
    with mp.workdps(digits):
        for i in np.flatnonzero(np.isfinite(high) & (np.abs(high) > 1e-300)):
            value = exact[name](*(mp.mpf(float(a[i])) for a in x))
            difference = abs(mp.mpf(float(high[i])) * (1 + mp.mpf(float(low[i]))) - value)
            worst = max(worst, float(difference / mp.mpf(2) ** (math.frexp(high[i])[1] - 53)))
    return worst
