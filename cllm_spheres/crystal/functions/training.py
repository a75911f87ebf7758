"""The elementary functions whose bits trained models have: the kernels' exp and log, the schedule's power and cosine.

No libm is called: results do not depend on the C library, and `exp` fills the vector lanes. All functions, over their
whole ranges and in both kinds of numbers, stand in elementary.py; a change here changes what is trained.
"""

from __future__ import annotations

import math

import numpy as np

from cllm_spheres.crystal.functions.bits import bits_of_double, bits_of_float, double_of_bits, float_of_bits
from cllm_spheres.crystal.jit import kernel

f4 = np.float32


ZERO, ONE, INFINITY = f4(0), f4(1), f4(np.inf)
EXP_LOW, EXP_HIGH = f4(-87), f4(88)
LOG2_E = f4(1.4426950408889634)
LN2_HIGH = f4(0.693359375)  # 9 bits: n * LN2_HIGH is exact
LN2_LOW = f4(-2.12194440e-4)
ROUND = f4(12582912)  # 1.5 * 2**23: adding it rounds to a whole number, which then stands in the low bits
ROUND_BITS = np.int32(0x4B400000)
# exp(r) = 1 + r + r**2 * (C5 + C4 r + ... + C0 r**5) on |r| <= ln2 / 2
C0, C1, C2 = f4(1.9875691500e-4), f4(1.3981999507e-3), f4(8.3334519073e-3)
C3, C4, C5 = f4(4.1665795894e-2), f4(1.6666665459e-1), f4(5.0000001201e-1)


@kernel
def exp(x):
    """e**x for a float32. Largest error 1.1 ulp on [-87, 88]; below it 0, above it inf; NaN stays NaN.

    Range reduction to |r| <= ln2/2, then a polynomial. Source: Cody and Waite; coefficients of Cephes expf.
    """
    t = EXP_LOW if x < EXP_LOW else x
    t = EXP_HIGH if t > EXP_HIGH else t
    rounded = t * LOG2_E + ROUND
    n = rounded - ROUND
    r = t - n * LN2_HIGH
    r = r - n * LN2_LOW
    p = ((((C0 * r + C1) * r + C2) * r + C3) * r + C4) * r + C5
    p = p * (r * r) + r + ONE
    power = float_of_bits(np.int32((bits_of_float(rounded) - ROUND_BITS + np.int32(127)) << np.int32(23)))
    y = p * power
    y = ZERO if x < EXP_LOW else y
    return INFINITY if x > EXP_HIGH else y


SQRT_HALF_BITS = np.int64(0x3FE6A09E667F3BCD)
MANTISSA_BITS = np.int64(52)
LN2 = math.log(2.0)


@kernel
def log(x):
    """Natural logarithm of a float64, 2 ulp for normal numbers > 0; NaN stays NaN, inf stays inf.

    x = m * 2**n with m in [sqrt(1/2), sqrt(2)); log m = 2 artanh(s), s = (m - 1) / (m + 1). For x <= 0: NaN.
    """
    if not x > 0.0:
        return np.nan
    if x == np.inf:
        return x
    bits = bits_of_double(x)
    n = (bits - SQRT_HALF_BITS) >> MANTISSA_BITS
    m = double_of_bits(bits - (n << MANTISSA_BITS))
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = 1 / 23.0
    for k in (21.0, 19.0, 17.0, 15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0):
        series = series * z + 1.0 / k
    return n * LN2 + (2.0 * s + 2.0 * s * z * series)


def integer_power(base: float, exponent: int) -> float:
    """base**exponent for a whole exponent >= 0 by repeated squaring: the same bits with every C library."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def cosine_0_pi(x: float) -> float:
    """cos(x) on [0, pi] by its Taylor series around pi/2, error below 1e-15: the same bits with every C library."""
    y = math.pi / 2 - x  # cos(x) = sin(pi/2 - x), |y| <= pi/2
    term = total = y
    for k in range(1, 14):
        term *= -y * y / ((2 * k) * (2 * k + 1))
        total += term
    return min(1.0, max(-1.0, total))
