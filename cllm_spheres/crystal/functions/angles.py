"""An angle in radians -> the quarter turn it lies in and what is left of it, in two float64; its sine and cosine.

`sin` and `cos` are for any float64. In loops that shall vectorise use `sin_near` and `cos_near`, right to FAR, and the
others for what lies beyond: crystal/functions/elementwise.py does so.

Up to FAR: Cody and Waite's reduction with pi/2 in three parts, whose first product cancels exactly in a fused
multiply-add. Beyond: Payne and Hanek's, the bits of 2/pi that count for this exponent times the mantissa, in integers.
The polynomials on [-pi/4, pi/4] are fdlibm's (Sun Microsystems, 1993; k_sin.c, k_cos.c), with the low part.
"""

from __future__ import annotations

import numpy as np

from cllm_spheres.crystal.functions.bits import (
    bits_of_double,
    fma,
    high_product,
    low_bits,
    magnitude,
    signed_as,
    turned,
)
from cllm_spheres.crystal.functions.reals import parts, pi
from cllm_spheres.crystal.jit import element, kernel

FAR = 2.0**30  # n * pi/2 is exact enough up to here, and n has room in an int32
ROUND = 1.5 * 2.0**52  # adding it rounds to a whole number
TINY = 2.0**-1022  # the smallest normal number: below it stands zero
_TWO_OVER_PI = parts(2 / pi(), 1)[0]
_HALF_PI = parts(pi() / 2, 3)
_P1, _P2, _P3 = _HALF_PI
# 64 zeros, then the binary digits of 2/pi after the point; the last digits of the largest exponent are below index 1300
_DIGITS = np.array([int((2 / pi()) * 2 ** (64 * k)) % 2**64 for k in range(22)], np.uint64)
S1, S2, S3 = -1.66666666666666324348e-01, 8.33333333332248946124e-03, -1.98412698298579493134e-04
S4, S5, S6 = 2.75573137070700676789e-06, -2.50507602534068634195e-08, 1.58969099521155010221e-10
C1, C2, C3 = 4.16666666666666019037e-02, -1.38888888888741095749e-03, 2.48015872894767294178e-05
C4, C5, C6 = -2.75573143513906633035e-07, 2.08757232129817482790e-09, -1.13596475577881948265e-11
u8 = np.uint64


@element
def near(x):
    """(n, high, low): |x| = n pi/2 + high + low and |high| <= pi/4, for |x| <= FAR; n int64, right modulo 2**51."""
    rounded = fma(magnitude(x), _TWO_OVER_PI, ROUND)
    n = rounded - ROUND
    first = fma(n, -_P1, magnitude(x))  # exact
    product = n * _P2
    high = first - product
    # the rounding error of the difference, that of the product, and the third part
    low = (first - high) - product
    low = low - fma(n, _P2, -product)
    return low_bits(rounded), high, fma(n, -_P3, low)


@element
def near_short(x):
    """(n, left): as `near`, with what is left in one float64: enough where a float32 is wanted."""
    rounded = fma(magnitude(x), _TWO_OVER_PI, ROUND)
    n = rounded - ROUND
    return low_bits(rounded), fma(n, -_P2, fma(n, -_P1, magnitude(x)))


@element
def sine(high, low):
    """sin(high + low) on [-pi/4, pi/4]."""
    z = high * high
    series = fma(fma(fma(fma(S6, z, S5), z, S4), z, S3), z, S2)
    cube = z * high
    return high - (fma(z, fma(0.5, low, -cube * series), -low) - cube * S1)


@element
def cosine(high, low):
    """cos(high + low) on [-pi/4, pi/4]."""
    z = high * high
    series = z * fma(fma(fma(fma(fma(C6, z, C5), z, C4), z, C3), z, C2), z, C1)
    half = 0.5 * z
    whole = 1.0 - half
    return whole + (((1.0 - whole) - half) + fma(z, series, -high * low))


@element
def of_quarter(n, high, low):
    """sin(n pi/2 + high + low)."""
    s, c = sine(high, low), cosine(high, low)
    return turned(c if n & 1 else s, n)


@element
def sin_near(x):
    """sin(x) for |x| <= FAR, elsewhere NaN."""
    n, high, low = near(x)
    y = signed_as(of_quarter(n, high, low), x)
    y = x if magnitude(x) < 2.0**-27 else y  # and the sign of a zero
    y = x * 0.0 if magnitude(x) < TINY else y
    return y if magnitude(x) <= FAR else np.nan


@element
def cos_near(x):
    """cos(x) for |x| <= FAR, elsewhere NaN."""
    n, high, low = near(x)
    y = of_quarter(n + 1, high, low)
    return y if magnitude(x) <= FAR else np.nan


@element
def far(x):
    """`near` for FAR < |x| < inf: n modulo 4.

    |x| = m 2**e with a whole m < 2**53. Of 2**e * 2/pi only what is left modulo 4 matters: 192 bits of the digits of
    2/pi from a place that e gives, the first two of them before the point. Their product with m modulo 4 in 128 bits.
    """
    bits = bits_of_double(magnitude(x))
    e = (bits >> 52) - 1075
    m = u8((bits & ((1 << 52) - 1)) | (1 << 52))
    start = e + 62  # 64 zeros, less two bits before the point
    k, shift = start >> 6, u8(start & 63)
    back = u8(63) - shift
    w0 = (_DIGITS[k] << shift) | ((_DIGITS[k + 1] >> u8(1)) >> back)
    w1 = (_DIGITS[k + 1] << shift) | ((_DIGITS[k + 2] >> u8(1)) >> back)
    w2 = (_DIGITS[k + 2] << shift) | ((_DIGITS[k + 3] >> u8(1)) >> back)
    middle = m * w1
    low = middle + high_product(m, w2)
    top = m * w0 + high_product(m, w1) + (u8(1) if low < middle else u8(0))
    n = (top + u8(1 << 61)) >> u8(62)  # to the nearest quarter
    left = np.int64(top - (n << u8(62)))
    # left / 2**62 + low / 2**126, in quarters: four whole numbers of 32 bits, each exact in a float64
    mask = u8(0xFFFFFFFF)
    a = np.float64(left >> 32) * 2.0**-30
    b = np.float64(u8(left) & mask) * 2.0**-62
    c = np.float64(low >> u8(32)) * 2.0**-94
    d = np.float64(low & mask) * 2.0**-126
    high = a + b  # exact, or its error is found below
    rest = (b - (high - a)) + (c + d)
    whole = high + rest
    rest = rest - (whole - high)
    # times pi/2
    product = whole * _P1
    error = fma(whole, _P1, -product) + (whole * _P2 + rest * _P1)
    quarter = product + error
    return np.int64(n), quarter, error - (quarter - product)


@kernel
def sin(x):
    """sin(x) of a float64, any size; NaN for infinite x. Largest error: docs/crystal.md."""
    if magnitude(x) <= FAR:
        return sin_near(x)
    if not magnitude(x) < np.inf:
        return np.nan
    n, high, low = far(x)
    return signed_as(of_quarter(n, high, low), x)


@kernel
def cos(x):
    """cos(x) of a float64, any size; NaN for infinite x. Largest error: docs/crystal.md."""
    if magnitude(x) <= FAR:
        return cos_near(x)
    if not magnitude(x) < np.inf:
        return np.nan
    n, high, low = far(x)
    return of_quarter(n + 1, high, low)
