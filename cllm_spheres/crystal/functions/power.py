"""x**y for float32 and float64: as C's pow (IEEE 754-2019, 9.2), for use in jitted loops; branch-free.

y log|x| with log|x| to more digits than the result has, then e to that. The logarithm: |x| = m 2**n with m in
[sqrt(1/2), sqrt(2)), log m = 2 artanh(s), s = (m - 1) / (m + 1), artanh's series s + s**3/3 + s**5/5 + ...; in float64
s and the first three terms are sums of two float64 (Dekker, 1971), so that the error is that of exp. Beyond them a
minimax fit by Remez's exchange. A subnormal number counts as zero of its sign, and a result below the normal range is
zero. Errors, special values and speeds: docs/crystal.md, "Functions".
"""

from __future__ import annotations

from fractions import Fraction
from math import inf, nan

import numpy as np

from cllm_spheres.crystal.functions.bits import binade, bits_of_double, fma, in_binade, magnitude, scaled
from cllm_spheres.crystal.functions.double import LARGEST, LN2_1, LOG2_E, ROUND, TINY, exp_of
from cllm_spheres.crystal.functions.polynomials import cubic
from cllm_spheres.crystal.functions.reals import ln2, parts
from cllm_spheres.crystal.jit import element

f4, f8 = np.float32, np.float64
TINY_4 = 2.0**-126
WHOLE = 2.0**52  # from here on all numbers are whole
THIRD, THIRD_REST = parts(Fraction(1, 3), 2)
FIFTH, FIFTH_REST = parts(Fraction(1, 5), 2)
A0, A1, A2, A3 = 0.14285714285716578, 0.11111111110007385, 0.09090909302530992, 0.07692286464823979
A4, A5, A6 = 0.06667880894802534, 0.0584253557490041, 0.059553564671736975
LN2_EXACT = float.fromhex("0x1.62e42fefa38p-1")  # 42 bits: n times it is exact
LN2_REST = parts(ln2() - Fraction(LN2_EXACT), 1)[0]
B0, B1, B2, B3 = 0.3333333282273439, 0.20000167593938706, 0.1426865436771777, 0.11791073869826839
E0, E1, E2 = 0.500000006810514, 0.16666665824461194, 0.04166629312203421
E3, E4, E5 = 0.008333508256274652, 0.00139448068225415, 0.00019783797450518428
BELOW, ABOVE = -709.0, 710.0  # e to less is 0, to more inf; between them the result tells


@element
def log_parts(x):
    """log x in two parts, right to about 2**-68 of it, for normal x > 0."""
    n, m = binade(x), in_binade(x)
    f = m - 1.0
    d = m + 1.0
    d_rest = m - (d - 1.0)
    u = 1.0 / d
    s = f * u
    s_rest = (fma(-s, d, f) - s * d_rest) * u
    z = s * s
    z_rest = fma(s, s, -z) + 2.0 * s * s_rest
    zz = z * z
    p = z * fma(fma(fma(A6, z, A5), z, A4), zz * zz, cubic(z, zz, A0, A1, A2, A3))
    a = FIFTH + p
    a_rest = ((FIFTH - a) + p) + FIFTH_REST
    q = z * a
    q_rest = fma(z, a, -q) + fma(z, a_rest, z_rest * a)
    b = THIRD + q
    b_rest = ((THIRD - b) + q) + (q_rest + THIRD_REST)
    v = z * b
    v_rest = fma(z, b, -v) + fma(z, b_rest, z_rest * b)
    w = s * v
    w_rest = fma(s, v, -w) + fma(s, v_rest, s_rest * v)
    half = s + w
    half_rest = ((s - half) + w) + (s_rest + w_rest)
    whole = n * LN2_EXACT
    high = whole + 2.0 * half
    low = ((whole - high) + 2.0 * half) + fma(n, LN2_REST, 2.0 * half_rest)
    top = high + low
    return top, (high - top) + low


@element
def log_short(x):
    """log x in one float64, right to 2**-37 of it, for normal x > 0."""
    n, m = binade(x), in_binade(x)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = z * cubic(z, z * z, B0, B1, B2, B3)
    return fma(n, LN2_1, fma(2.0 * s, series, 2.0 * s))


@element
def exp_short(x):
    """e**x in float64, right to 2**-34 of it, where it is a normal number."""
    rounded = fma(x, LOG2_E, ROUND)
    n = rounded - ROUND
    r = fma(n, -LN2_1, x)
    z = r * r
    p = fma(fma(E5, r, E4), z * z, cubic(r, z, E0, E1, E2, E3))
    return scaled(fma(z, p, 1.0 + r), rounded)


@element
def log_of_end(log, a):
    """log a for the ends that the series does not know: zero, inf and NaN."""
    log = -inf if a == 0.0 else log
    return log if a < inf else a


@element
def with_sign(size, exponent, x, y):
    """x**y from `size` = exp(exponent), the exponent y log|x|; x, y: float64 whose subnormals are zeros."""
    b = magnitude(y)
    shifted = b + WHOLE if b < WHOLE else b  # of numbers below 2**53 its last bit is that before y's point
    is_whole = (shifted - WHOLE == b) | (b >= WHOLE)
    is_odd = is_whole & (b < 2.0 * WHOLE) & (bits_of_double(shifted) & 1 == 1)
    size = size if exponent == exponent else nan
    size = 1.0 if magnitude(x) == 1.0 else size  # y may be infinite
    size = -size if is_odd & (bits_of_double(x) < 0) else size
    size = size if is_whole | (x >= 0.0) | (x == -inf) else nan
    size = size if x == x else nan
    return 1.0 if (y == 0.0) | (x == 1.0) else size


@element
def double_size(log, log_rest, y):
    """(exp of y (log + log_rest), zero below the normal range, infinite above; y log)."""
    high = y * log
    size = exp_of(high, fma(y, log, -high) + y * log_rest)
    size = size if (size <= LARGEST) | (high < 700.0) else inf
    size = inf if high > ABOVE else size
    return (0.0 if (high < BELOW) | (size < TINY) else size), high


@element
def single_size(log, y):
    """The same in float64 for float32."""
    exponent = y * log
    size = exp_short(exponent)
    size = inf if exponent > 100.0 else size
    return (0.0 if (exponent < -100.0) | (size < TINY_4) else size), exponent


@element
def double_pow(x, y):
    """x**y in float64."""
    x = x * 0.0 if magnitude(x) < TINY else x
    y = y * 0.0 if magnitude(y) < TINY else y
    log, log_rest = log_parts(magnitude(x))
    size, exponent = double_size(log_of_end(log, magnitude(x)), log_rest, y)
    return with_sign(size, exponent, x, y)


@element
def double_pow_plain(x, y):
    """x**y in float64 for normal x > 0 and finite y: the bits of `double_pow`, in less time."""
    log, log_rest = log_parts(x)
    return double_size(log, log_rest, y)[0]


@element
def single_pow(x, y):
    """x**y in float32; in float64 inside."""
    x8, y8 = f8(x), f8(y)
    x8 = x8 * 0.0 if magnitude(x8) < TINY_4 else x8
    y8 = y8 * 0.0 if magnitude(y8) < TINY_4 else y8
    size, exponent = single_size(log_of_end(log_short(magnitude(x8)), magnitude(x8)), y8)
    return f4(with_sign(size, exponent, x8, y8))


@element
def single_pow_plain(x, y):
    """x**y in float32 for normal x > 0 and finite y: the bits of `single_pow`, in less time."""
    return f4(single_size(log_short(f8(x)), f8(y))[0])
