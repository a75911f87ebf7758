"""Elementary functions of one float32, for use in jitted loops: branch-free, so that the compiler fills vector lanes.

No libm is called. Errors in ulp over all 2**32 arguments, behaviour at special values and speeds stand in
docs/crystal.md, "Functions". A subnormal number counts as zero of its sign, and a result below the normal range is
zero: the same bits whether the CPU flushes subnormals or not. exp, log, tanh, sigmoid and erf compute in float32;
where that would lose digits (sin, cos, GELU) float64 is used inside. Coefficients are minimax fits of the relative
error (of erf's second polynomial: the error in erf) by Remez's exchange, in 50 digits.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
from numba import types

from cllm_spheres.crystal.functions import angles, double, exponential
from cllm_spheres.crystal.functions.bits import binade, fma, in_binade, magnitude, signed_as, turned
from cllm_spheres.crystal.functions.exponential import EXP_LOW
from cllm_spheres.crystal.functions.polynomials import cubic, seventh
from cllm_spheres.crystal.jit import element, kernel
from cllm_spheres.crystal.lanes import Lanes, vectorised

f4, f8 = np.float32, np.float64
ZERO, HALF, ONE, TWO, INFINITY, NAN = f4(0), f4(0.5), f4(1), f4(2), f4(np.inf), f4(np.nan)
TINY = f4(2.0**-126)  # the smallest normal number
TINY_8 = 2.0**-126


@vectorised(types.float32, result=types.float32)
def exp_of(b, x):
    """e**x where it is a normal number: elsewhere nonsense."""
    return exponential.exp_of(Lanes(b, x)).value


@vectorised(types.float32, result=types.float32)
def _exp(b, x):
    return exponential.exp(Lanes(b, x)).value


@element
def exp(x):
    """e**x: 0 where it is below the normal range, inf where above."""
    return _exp(x)


L0, L1, L2, L3 = f4(0.33333313), f4(-0.25000009), f4(0.20002119), f4(-0.16667996)
L4, L5, L6, L7, L8 = f4(0.14219555), f4(-0.12405589), f4(0.11888145), f4(-0.1167564), f4(0.06746663)
LN2_EXACT, LN2_REST = f4(0.693359375), f4(-2.12194440e-4)  # n * the first is exact


@element
def log(x):
    """Natural logarithm: -inf at 0, NaN below.

    x = m 2**n with m in [sqrt(1/2), sqrt(2)), f = m - 1: f - f**2/2 + f**3 * (a polynomial). Source: Cephes, logf.
    """
    n, f = binade(x), in_binade(x) - ONE
    z = f * f
    p = fma(L8, (z * z) * (z * z), seventh(f, z, L0, L1, L2, L3, L4, L5, L6, L7))
    tail = fma(n, LN2_REST, fma(z * f, p, -HALF * z))
    y = fma(n, LN2_EXACT, f + tail)
    y = y if x >= TINY else (NAN if x <= -TINY else -INFINITY)
    return y if x < INFINITY else x


T0, T1, T2 = f4(-0.3333328), f4(0.13331442), f4(-0.053739715)
T3, T4 = f4(0.020639094), f4(-0.005704995)


@element
def tanh(x):
    """Hyperbolic tangent: x + x**3 * (a polynomial of x**2) below 0.625, 1 - 2 / (exp(2|x|) + 1) above."""
    t = magnitude(x)
    z = t * t
    zz = z * z
    p = fma(T4, zz * zz, cubic(z, zz, T0, T1, T2, T3))
    small = fma(t, z * p, t)
    large = ONE - TWO / (exp_of(TWO * t) + ONE)
    y = small if t < f4(0.625) else large
    y = ONE if t > f4(10) else y
    y = ZERO if t < TINY else y
    return signed_as(y, x) if x == x else x


@element
def sigmoid(x):
    """1 / (1 + exp(-x)): of exp(-|x|), so that nothing overflows."""
    t = magnitude(x)
    e = exp_of(-t)
    e = ZERO if t >= -EXP_LOW else e
    d = ONE + e
    rest = e - (d - ONE)
    top = e if x < ZERO else ONE
    q = top / d
    y = fma(fma(-q, d, top) - q * rest, fma(-HALF, e, ONE), q)  # towards top / (1 + e); the factor is nearly 1 / d
    y = ZERO if y < TINY else y
    return y if x == x else x


@element
def sigmoid_parts(x):
    """(sigmoid, 1 - sigmoid) of 2u in float64, u as in `gelu`, and its argument, at least -64 and at most 64."""
    x = f8(x)
    x = x if x < double.GELU_END else double.GELU_END
    x = x if x > -double.GELU_END else -double.GELU_END
    e = double.exp_of(-magnitude(x * fma(double.B1, x * x, double.A1)), 0.0)
    e = e if magnitude(x) < 16.0 else 0.0
    u = 1.0 / (1.0 + e)
    other = e * u
    return (other if x < 0.0 else u), (u if x < 0.0 else other), x


@element
def gelu(x):
    """x/2 (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x**3), the model's GELU: x * sigmoid(2u), in float64 inside."""
    s, _, t = sigmoid_parts(x)
    y = t * s if x < f4(16) else f8(x)
    y = y if magnitude(y) >= TINY_8 else y * 0.0
    return f4(y) if x == x else x


@element
def gelu_slope(x):
    """gelu'(x): s (1 + x (1 - s) d(2u)/dx) with s = sigmoid(2u), in float64 inside."""
    s, other, t = sigmoid_parts(x)
    y = s * fma(t * other, fma(3.0 * double.B1, t * t, double.A1), 1.0)
    y = y if magnitude(y) >= TINY_8 else -0.0
    return f4(y) if x == x else x


@element
def square_root(x):
    """sqrt(x), rounded correctly by the CPU; -0 stays -0, NaN below."""
    return f4(sqrt(x)) if magnitude(x) >= TINY else x * ZERO


@element
def rsqrt(x):
    """1 / sqrt(x): inf of its sign at a zero, NaN below."""
    return ONE / square_root(x)


S0, S1, S2, S3 = f4(0.12837917), f4(-0.37612626), f4(0.112835854), f4(-0.02685381)
S4, S5, S6 = f4(0.0051883273), f4(-8.010188e-4), f4(7.853845e-5)
Q0, Q1, Q2, Q3 = f4(0.00035375932), f4(1.1270399), f4(0.638226), f4(0.10303713)
Q4, Q5, Q6 = f4(-0.021805208), f4(0.0029395802), f4(-0.0001855713)
ERF_END = f4(4)  # beyond it erf is 1 to half an ulp


@element
def erf(x):
    """Error function: x + x * (a polynomial of x**2) below 1, 1 - exp(-(a polynomial of |x|)) above."""
    t = magnitude(x)
    z = t * t
    zz = z * z
    p = fma(fma(fma(S6, z, S5), z, S4), zz * zz, cubic(z, zz, S0, S1, S2, S3))
    small = fma(t, p, t)
    v = t if t < ERF_END else ERF_END
    vv = v * v
    q = fma(fma(fma(Q6, v, Q5), v, Q4), vv * vv, cubic(v, vv, Q0, Q1, Q2, Q3))
    y = small if t < ONE else ONE - exp_of(-q)
    y = ZERO if t < TINY else y
    return signed_as(y, x) if x == x else x


N0, N1, N2, N3 = -0.1666666664077532, 0.00833332930234944, -1.9839311469757256e-4, 2.7181140019185286e-06
C0, C1, C2 = 0.041666646855354934, -0.0013887366946552927, 2.443838333784244e-05


@element
def of_quarter(n, r):
    """sin(n pi/2 + r) for |r| <= pi/4, float64, right to more than float32 has."""
    z = r * r
    sine = fma(r * z, fma(fma(fma(N3, z, N2), z, N1), z, N0), r)
    cosine = fma(z * z, fma(fma(C2, z, C1), z, C0), fma(-0.5, z, 1.0))
    return turned(cosine if n & 1 else sine, n)


@element
def sin_near(x):
    """sin(x) for |x| <= angles.FAR, elsewhere NaN. In float64 inside."""
    n, r = angles.near_short(f8(x))
    y = signed_as(f4(of_quarter(n, r)), x)
    y = x * ZERO if magnitude(x) < TINY else y
    return y if magnitude(x) <= f4(angles.FAR) else NAN


@element
def cos_near(x):
    """cos(x) for |x| <= angles.FAR, elsewhere NaN. In float64 inside."""
    n, r = angles.near_short(f8(x))
    y = f4(of_quarter(n + 1, r))
    return y if magnitude(x) <= f4(angles.FAR) else NAN


@kernel
def sin(x):
    """sin(x) of a float32, any size; NaN for infinite x."""
    return sin_near(x) if magnitude(x) <= f4(angles.FAR) else f4(angles.sin(f8(x)))


@kernel
def cos(x):
    """cos(x) of a float32, any size; NaN for infinite x."""
    return cos_near(x) if magnitude(x) <= f4(angles.FAR) else f4(angles.cos(f8(x)))
