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

from cllm_spheres.crystal.bits import double_of_bits, fma
from cllm_spheres.crystal.jit import element
from cllm_spheres.crystal.reals import ln2, parts, pi, root

Pair = tuple[np.ndarray, np.ndarray]
Scaled = tuple[np.ndarray, np.ndarray, np.ndarray]  # a pair, and the power of two that it is to be multiplied with
LD = np.longdouble
LN2 = parts(ln2(), 3)
EXP_TERMS = 24
ERF_STEP, ERF_TERMS, ERF_END = 0.0625, 24, 6.0


def is_wide() -> bool:
    """Whether long double has x86's 64 bits."""
    return bool(np.finfo(LD).nmant == 63)


@element
def _times(a, a_rest, b, b_rest):
    high = a * b
    low = fma(a, b, -high) + fma(a, b_rest, a_rest * b)
    top = high + low
    return top, low - (top - high)


@element
def _plus(a, a_rest, b, b_rest):
    high = a + b
    other = high - a
    low = (a - (high - other)) + (b - other) + (a_rest + b_rest)
    top = high + low
    return top, low - (top - high)


@element
def multiply(a_N, a_rest_N, b_N, b_rest_N, out_N, rest_N):
    """out = a * b."""
    for i in range(a_N.size):
        out_N[i], rest_N[i] = _times(a_N[i], a_rest_N[i], b_N[i], b_rest_N[i])


@element
def add(a_N, a_rest_N, b_N, b_rest_N, out_N, rest_N):
    """out = a + b."""
    for i in range(a_N.size):
        out_N[i], rest_N[i] = _plus(a_N[i], a_rest_N[i], b_N[i], b_rest_N[i])


@element
def divide(a_N, a_rest_N, b_N, b_rest_N, out_N, rest_N):
    """out = a / b."""
    for i in range(a_N.size):
        q = a_N[i] / b_N[i]
        p, p_rest = _times(q, 0.0, b_N[i], b_rest_N[i])
        left = ((a_N[i] - p) - p_rest) + a_rest_N[i]
        second = left / b_N[i]
        out_N[i] = q + second
        rest_N[i] = second - (out_N[i] - q)


@element
def polynomial(c_K, c_rest_K, x_N, x_rest_N, out_N, rest_N):
    """out = the polynomial of x with coefficients c, the lowest first."""
    last = c_K.size - 1
    for i in range(x_N.size):
        out_N[i], rest_N[i] = c_K[last], c_rest_K[last]
    for k in range(last - 1, -1, -1):
        c, c_rest = c_K[k], c_rest_K[k]
        for i in range(x_N.size):
            p, p_rest = _times(out_N[i], rest_N[i], x_N[i], x_rest_N[i])
            out_N[i], rest_N[i] = _plus(c, c_rest, p, p_rest)


@element
def reduce(x_N, x_rest_N, log2_e, a, b, c, n_N, out_N, rest_N):
    """out = x - n (a + b + c) with the whole n nearest to x / ln 2."""
    for i in range(x_N.size):
        n = np.rint(x_N[i] * log2_e)
        p, q = n * b, n * c
        first = fma(n, -a, x_N[i])
        high, low = _plus(first, 0.0, -p, -fma(n, b, -p))
        n_N[i] = n
        out_N[i], rest_N[i] = _plus(high, low, x_rest_N[i], -q)


def _call(kernel: Any, *arguments: Any) -> Pair:
    """A kernel of rows with two rows to write."""
    out, rest = np.empty(arguments[-1].size), np.empty(arguments[-1].size)
    kernel(*arguments, out, rest)
    return out, rest


@cache
def _coefficients(values: tuple[Fraction, ...]) -> Pair:
    high, low = zip(*(parts(value, 2) for value in values), strict=True)
    return np.array(high), np.array(low)


def _of_number(value: Fraction, like: np.ndarray) -> Pair:
    high, low = parts(value, 2)
    return np.full(like.size, high), np.full(like.size, low)


TAYLOR = tuple(Fraction(1, math.factorial(k)) for k in range(EXP_TERMS))


def _exp_parts(x: np.ndarray, rest: np.ndarray) -> tuple[np.ndarray, Pair]:
    """(n, m) with exp(x + rest) = m 2**n, for |x| < 1e5."""
    n, r, r_rest = np.empty(x.size), np.empty(x.size), np.empty(x.size)
    reduce(x, rest, 1 / math.log(2), *LN2, n, r, r_rest)
    return n, _call(polynomial, *_coefficients(TAYLOR), r, r_rest)


@element
def scale(m_N, m_rest_N, n_N, out_N, rest_N):
    """out = m * 2**n, n within 2,140 of zero."""
    for i in range(n_N.size):
        n = np.int64(n_N[i])
        half = n >> 1
        first, second = double_of_bits((half + 1023) << 52), double_of_bits((n - half + 1023) << 52)
        out_N[i], rest_N[i] = m_N[i] * first * second, m_rest_N[i] * first * second


def _scaled(n: np.ndarray, m: Pair) -> Pair:
    return _call(scale, *m, np.clip(n, -2040, 2040))


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
    e = _scaled(*_exp_parts(-y, np.zeros(x.size)))
    zeros = np.zeros(x.size)
    t, t_rest = _add(_call(multiply, mantissa, zeros, *e), -1.0)
    t_rest = t_rest - t * t / 2
    f = mantissa - 1
    small = np.abs(f) < 2.0**-16
    series = _call(polynomial, *_coefficients(tuple(Fraction((-1) ** k, k + 1) for k in range(8))), f, zeros)
    series = _call(multiply, *series, f, zeros)
    high, rest = np.where(small, series[0], y), np.where(small, series[1], 0.0)
    high, rest = _call(add, high, rest, np.where(small, 0.0, t), np.where(small, 0.0, t_rest))
    whole = _call(multiply, n.astype(np.float64), zeros, *_of_number(ln2(), x))
    high, rest = _call(add, *whole, high, rest)
    edge = np.where(x > 0, np.inf, np.where(x == 0, -np.inf, np.nan))
    return np.where(ordinary, high, edge), np.where(ordinary, rest, 0.0)


def _tanh(x: np.ndarray) -> Pair:
    """(e - 1) / (e + 1) with e = exp(2|x|); below 2**-10 the series."""
    t = np.minimum(np.abs(x), 30.0)
    e = _scaled(*_exp_parts(2 * t, 0 * t))
    large = _call(divide, *_add(e, -1.0), *_add(e, 1.0))
    square = _call(multiply, x, 0 * t, x, 0 * t)
    odd = tuple(Fraction(*c) for c in ((1, 1), (-1, 3), (2, 15), (-17, 315), (62, 2835), (-1382, 155925)))
    small = _call(multiply, *_call(polynomial, *_coefficients(odd), *square), t, 0 * t)
    chosen = t < 2.0**-10
    high, rest = np.where(chosen, small[0], large[0]), np.where(chosen, small[1], large[1])
    return np.copysign(high, x), np.where(np.signbit(x), -rest, rest)


def _add(a: Pair, number: float) -> Pair:
    return _call(add, *a, np.full(a[0].size, number), np.zeros(a[0].size))


def _logistic(z: Pair) -> tuple[Pair, Pair, np.ndarray]:
    """(1 / (1 + e), m / (1 + e), n) with e = m 2**n = exp(-z), z >= 0."""
    n, m = _exp_parts(-np.minimum(z[0], 1400.0), -z[1])
    d = _add(_scaled(n, m), 1.0)
    one = np.ones(z[0].size)
    return _call(divide, one, 0 * one, *d), _call(divide, *m, *d), n


def _sigmoid(x: np.ndarray) -> Scaled:
    one, other, n = _logistic((np.abs(x), np.zeros(x.size)))
    return np.where(x < 0, other[0], one[0]), np.where(x < 0, other[1], one[1]), np.where(x < 0, n, 0.0)


TWICE = 2 * root(2 / pi())
CUBIC = TWICE * 44715 / 10**6


def _gelu_exponent(t: np.ndarray) -> tuple[Pair, Pair]:
    """(2u, d(2u)/dx)."""
    square = _call(multiply, t, 0 * t, t, 0 * t)
    exponent = _call(polynomial, *_coefficients((TWICE, CUBIC)), *square)
    slope = _call(polynomial, *_coefficients((TWICE, 3 * CUBIC)), *square)
    return _call(multiply, *exponent, t, 0 * t), slope


def _gelu(x: np.ndarray) -> Scaled:
    t = np.minimum(np.abs(x), 64.0)
    one, other, n = _logistic(_gelu_exponent(t)[0])
    below = _call(multiply, *other, t, 0 * t)
    above = _call(multiply, *one, t, 0 * t)
    high = np.where(x < 0, -below[0], np.where(np.abs(x) < 64, np.copysign(above[0], x), x))
    low = np.where(x < 0, -below[1], np.where(np.abs(x) < 64, above[1], 0.0))
    return high, low, np.where(x < 0, n, 0.0)


def _gelu_slope(x: np.ndarray) -> Scaled:
    t = np.minimum(np.abs(x), 64.0)
    z, slope = _gelu_exponent(t)
    one, other, n = _logistic(z)
    s = [np.where(x < 0, b, a) for a, b in zip(one, other, strict=True)]  # without 2**n where x < 0
    rest = [np.where(x < 0, a, b) for a, b in zip(one, _scaled(n, other), strict=True)]
    p = _call(multiply, *_call(multiply, *rest, t, 0 * t), *slope)
    sign = np.where(x < 0, -1.0, 1.0)
    factor = _add((p[0] * sign, p[1] * sign), 1.0)
    return *_call(multiply, *s, *factor), np.where(x < 0, n, 0.0)


def _pow(x: np.ndarray, y: np.ndarray) -> Scaled:
    """exp(y log|x|); C's signs and special values from numpy."""
    size = np.abs(x)
    ordinary = (size > 0) & (size < np.inf) & np.isfinite(y) & (y != 0)
    log = _log(np.where(ordinary, size, 1.0))
    bounded = np.clip(np.where(ordinary, y, 1.0), -1e200, 1e200)
    exponent = _call(multiply, *log, bounded, 0 * bounded)
    high, low, n = _exp(exponent[0], np.where(np.abs(exponent[0]) < 1400, exponent[1], 0.0))
    whole = np.rint(y) == y
    odd = whole & (np.rint(y / 2) != y / 2)
    sign = np.where(np.signbit(x) & odd, -1.0, 1.0)
    usual = ordinary & (whole | (x > 0))
    high, low, n = (np.where(usual, a, 0.0) for a in (sign * high, sign * low, n))
    high[~usual] = np.power(x[~usual], y[~usual])
    return high, low, n


@element
def quarters(x_N, two_over_pi, a, b, c, n_N, out_N, rest_N):
    """x = n pi/2 + out, for |x| up to NEAR, with pi/2 = a + b + c."""
    for i in range(x_N.size):
        n = np.rint(x_N[i] * two_over_pi)
        p = n * b
        high, low = _plus(fma(n, -a, x_N[i]), 0.0, -p, -fma(n, b, -p))
        n_N[i] = n
        out_N[i], rest_N[i] = _plus(high, low, -n * c, 0.0)


SINE = tuple(Fraction((-1) ** k, math.factorial(2 * k + 1)) for k in range(14))
COSINE = tuple(Fraction((-1) ** k, math.factorial(2 * k)) for k in range(14))
HALF_PI = parts(pi() / 2, 3)
NEAR = 2.0**29


def _angle(x: np.ndarray, quarter: int) -> Pair:
    """sin(x + quarter pi/2): Taylor series of what is left to the nearest quarter; far away the C library's."""
    near = np.abs(x) <= NEAR
    n, r, r_rest = np.empty(x.size), np.empty(x.size), np.empty(x.size)
    quarters(np.where(near, x, 0.0), 2 / math.pi, *HALF_PI, n, r, r_rest)
    square = _call(multiply, r, r_rest, r, r_rest)
    sine = _call(multiply, *_call(polynomial, *_coefficients(SINE), *square), r, r_rest)
    cosine = _call(polynomial, *_coefficients(COSINE), *square)
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
        return _coefficients(tuple(map(Fraction, coefficients)))


def erf_near(x: np.ndarray, centre: float) -> Pair:
    """erf of |x| within ERF_STEP / 2 of a centre, with x's sign."""
    h = np.abs(x) - centre  # exact
    c, c_rest = _erf_series(centre)
    if centre:
        high, rest = _call(polynomial, c, c_rest, h, 0 * h)
    else:
        high, rest = _call(multiply, *_call(polynomial, c[1:], c_rest[1:], h, 0 * h), h, 0 * h)
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
            high = _scaled(n[0], (high, low))[0]
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
