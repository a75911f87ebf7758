"""Elementary functions of one float64, for use in jitted loops: branch-free, so that the compiler fills vector lanes.

No libm is called. Errors in ulp, behaviour at special values and speeds stand in docs/crystal.md, "Functions". A
subnormal number counts as zero of its sign, and a result below the normal range is zero: the same bits whether the CPU
flushes subnormals or not. Coefficients without another source are minimax fits of the relative error by Remez's
exchange, in 50 digits.
"""

from __future__ import annotations

from math import inf, nan, sqrt

from cllm_spheres.crystal.functions import angles
from cllm_spheres.crystal.functions.bits import binade, fma, in_binade, magnitude, scaled, signed_as
from cllm_spheres.crystal.functions.polynomials import cubic, seventh
from cllm_spheres.crystal.functions.reals import ln2, parts, pi, root
from cllm_spheres.crystal.jit import element

TINY = 2.0**-1022  # the smallest normal number
LARGEST = (2.0 - 2.0**-52) * 2.0**1023
ROUND = 1.5 * 2.0**52  # adding it rounds to a whole number, which then stands in the low bits
LOG2_E = parts(1 / ln2(), 1)[0]
LN2_1, LN2_2 = parts(ln2(), 2)
EXP_LOW, EXP_HIGH = -708.3964185322641, 709.782712893384  # e**x is a normal number between them
E0, E1, E2, E3, E4 = (
    0.5000000000000011,
    0.16666666666666394,
    0.041666666666528844,
    0.008333333333506575,
    1.3888888944055316e-3,
)
E5, E6, E7 = 1.984126947880007e-4, 2.480149259055396e-5, 2.7557612430314623e-6
E8, E9 = 2.7630450397977983e-7, 2.4991450827062375e-8


@element
def exp_parts(high, low):
    """(m, rounded) with e**(high + low) = scaled(m, rounded), m about 0.7 to 1.42; |low| below an ulp of high.

    Range reduction to |r| <= ln2/2 with ln2 in two parts, then 1 + r + r**2 * (a polynomial), 1 + r in two parts.
    Source: Cody and Waite; Tang, Table-driven implementation of the exponential function (1989), for the low part.
    """
    rounded = fma(high, LOG2_E, ROUND)
    n = rounded - ROUND
    first = fma(n, -LN2_1, high)  # exact
    correction = fma(n, -LN2_2, low)
    r = first + correction
    rest = (first - r) + correction
    z = r * r
    p = fma(fma(E9, r, E8), (z * z) * (z * z), seventh(r, z, E0, E1, E2, E3, E4, E5, E6, E7))
    one = 1.0 + r
    tail = (r - (one - 1.0)) + fma(rest, r, rest)
    return one + fma(z, p, tail), rounded


@element
def exp_of(high, low):
    """e**(high + low) where it is a normal number: elsewhere nonsense."""
    m, rounded = exp_parts(high, low)
    return scaled(m, rounded)


@element
def exp(x):
    """e**x: 0 where it is below the normal range, inf where above."""
    y = exp_of(x, 0.0)
    y = 0.0 if x < EXP_LOW else y
    y = inf if x > EXP_HIGH else y
    return y if x == x else x


L1, L2, L3, L4 = 6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01, 2.222219843214978396e-01
L5, L6, L7 = 1.818357216161805012e-01, 1.531383769920937332e-01, 1.479819860511658591e-01
LN2_EXACT, LN2_REST = 6.93147180369123816490e-01, 1.90821492927058770002e-10  # n * the first is exact


@element
def log(x):
    """Natural logarithm: -inf at 0, NaN below.

    x = m 2**n with m in [sqrt(1/2), sqrt(2)); f = m - 1, s = f/(2 + f). Source: fdlibm (Sun, 1993), e_log.c.
    """
    n, f = binade(x), in_binade(x) - 1.0
    s = f / (2.0 + f)
    z = s * s
    zz = z * z
    r = z * fma(fma(fma(L7, z, L6), z, L5), zz * zz, cubic(z, zz, L1, L2, L3, L4))
    half = 0.5 * f * f
    y = n * LN2_EXACT - ((half - fma(s, half + r, n * LN2_REST)) - f)
    y = y if x >= TINY else (nan if x <= -TINY else -inf)
    return y if x < inf else x


T0, T1, T2, T3 = -0.33333333333333315, 0.13333333333329742, -0.053968253966057866, 0.021869488468693445
T4, T5, T6, T7 = -0.008863234312299722, 0.0035921139975990976, -0.001455725935713227, 0.000589451753941451
T8, T9, T10, T11 = -2.3701162132724787e-4, 9.155824426174043e-5, -3.0187071973818104e-5, 6.0424105982268105e-6


@element
def tanh(x):
    """Hyperbolic tangent: x + x**3 * (a polynomial of x**2) below 0.625, 1 - 2 / (exp(2|x|) + 1) above."""
    t = magnitude(x)
    z = x * x
    zz = z * z
    p = fma(cubic(z, zz, T8, T9, T10, T11), (zz * zz) * (zz * zz), seventh(z, zz, T0, T1, T2, T3, T4, T5, T6, T7))
    small = fma(t, z * p, t)
    large = 1.0 - 2.0 / (exp_of(2.0 * t, 0.0) + 1.0)
    y = small if t < 0.625 else large
    y = 1.0 if t > 20.0 else y
    y = 0.0 if t < TINY else y
    return signed_as(y, x) if x == x else x


UP, DOWN = 64.0, 2.0**-64  # what may be below the normal range until it meets its factor is held 2**64 times as large


@element
def logistic(high, low):
    """1 / (1 + e) and 2**64 e / (1 + e), each in two parts, with e = exp(-(high + low)), high >= 0.

    The sum 1 + e in two parts, and the residuals of the quotients.
    """
    m, rounded = exp_parts(-high, -low)
    e = scaled(m, rounded + UP) if high < 750.0 else 0.0
    small = e * DOWN
    d = 1.0 + small
    rest = small - (d - 1.0)
    u = 1.0 / d
    q = e * u
    return u, (fma(-u, d, 1.0) - u * rest) * u, q, (fma(-q, d, e) - q * rest) * u


@element
def sigmoid(x):
    """1 / (1 + exp(-x)): of exp(-|x|), so that nothing overflows."""
    t = magnitude(x)
    e = exp_of(-t, 0.0)
    e = 0.0 if t > -EXP_LOW else e
    d = 1.0 + e
    rest = e - (d - 1.0)
    top = e if x < 0.0 else 1.0
    q = top / d
    y = fma(fma(-q, d, top) - q * rest, fma(-0.5, e, 1.0), q)  # towards top / (1 + e); the factor is nearly 1 / d
    y = 0.0 if y < TINY else y
    return y if x == x else x


# 2u = x (A + B x**2) with u as in `gelu`: A = 2 sqrt(2/pi), B = 0.044715 A
A1, A2 = parts(2 * root(2 / pi()), 2)
B1, B2 = parts(2 * root(2 / pi()) * 44715 / 10**6, 2)
C1, C2 = parts(6 * root(2 / pi()) * 44715 / 10**6, 2)  # 3 B
GELU_END = 64.0  # beyond, the sigmoid is 0 or 1


@element
def gelu_parts(x):
    """(|x| but at most GELU_END, and |2u| in two parts): where 2u = 700, half an ulp of it is 300 of the result's."""
    t = magnitude(x)
    t = t if t < GELU_END else GELU_END
    w = t * t
    w_rest = fma(t, t, -w)
    b = B1 * w
    b_rest = fma(B1, w, -b) + fma(B1, w_rest, B2 * w)
    total = A1 + b
    other = total - A1
    rest = ((A1 - (total - other)) + (b - other)) + (b_rest + A2)
    high = total * t
    return t, high, fma(total, t, -high) + rest * t


@element
def gelu(x):
    """x/2 (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x**3), the model's GELU: x * sigmoid(2u)."""
    t, high, low = gelu_parts(x)
    one, one_rest, other, other_rest = logistic(high, low)
    y = fma(t, other, t * other_rest) * DOWN if x < 0.0 else fma(magnitude(x), one, t * one_rest)
    y = 0.0 if y < TINY else y
    return signed_as(y, x) if x == x else x


@element
def gelu_slope(x):
    """gelu'(x): s (1 + x (1 - s) d(2u)/dx) with s = sigmoid(2u); the second sum, which may cancel, in two parts."""
    t, high, low = gelu_parts(x)
    one, one_rest, other, other_rest = logistic(high, low)
    w = t * t
    slope = fma(C1, w, A1)
    slope_rest = fma(C1, w, A1 - slope) + (fma(C1, fma(t, t, -w), C2 * w) + A2)
    s, s_rest = (other, other_rest) if x < 0.0 else (one, one_rest)
    # 1 - p with p = |x| (1 - s) d(2u)/dx where x < 0: they cancel; elsewhere 1 + p
    q = one * t if x < 0.0 else -other * DOWN * t
    q_rest = fma(one, t, -q) + one_rest * t if x < 0.0 else -other_rest * DOWN * t
    p = q * slope
    p_rest = fma(q, slope, -p) + fma(q_rest, slope, q * slope_rest)
    f = 1.0 - p
    f_rest = ((1.0 - f) - p) - p_rest
    y = fma(s, f, fma(s_rest, f, s * f_rest))
    y = y * DOWN if x < 0.0 else y
    y = -0.0 if magnitude(y) < TINY else y
    return y if x == x else x


@element
def square_root(x):
    """sqrt(x), rounded correctly by the CPU; -0 stays -0, NaN below."""
    return sqrt(x) if magnitude(x) >= TINY else x * 0.0


@element
def rsqrt(x):
    """1 / sqrt(x): inf of its sign at a zero, NaN below."""
    return 1.0 / square_root(x)


S0, S1, S2, S3 = 0.1283791670955126, -0.3761263890318375, 0.11283791670954857, -0.02686617064507288
S4, S5, S6, S7 = 0.005223977624780722, -8.548326978734895e-4, 1.2055331036660952e-4, -1.4925593501682542e-5
S8, S9, S10 = 1.6460972740346907e-6, -1.6350024470283844e-7, 1.4657875127586549e-8
S11, S12 = -1.1365648892840728e-9, 5.945234583839407e-11
Q0, Q1, Q2, Q3 = 1.8496055099332483, 2.6389675142347904, 0.8431072563585602, 0.0415610980442572
Q4, Q5, Q6 = -0.010033825401213382, 0.0019779027425489695, -2.373232112979278e-4
Q7, Q8, Q9 = -2.6275826531909804e-5, 2.7155139194298344e-5, -9.603494338778224e-6
Q10, Q11, Q12 = 2.054597241585598e-6, -1.3943818193899886e-7, -9.906149150728839e-8
Q13, Q14, Q15 = 5.242115844400245e-8, -1.4928782311635797e-8, 2.8411303710502264e-9
Q16, Q17, Q18 = -3.603522178975456e-10, 2.767339616910537e-11, -9.741215833321148e-13
ERF_END = 5.95  # beyond it erf is 1 to half an ulp


@element
def erf(x):
    """Error function: x + x * (a polynomial of x**2) below 1, 1 - exp(-(a polynomial of |x| - 1)) above."""
    t = magnitude(x)
    z = t * t
    zz = z * z
    p = fma(S12, zz * zz, cubic(z, zz, S8, S9, S10, S11))
    p = fma(p, (zz * zz) * (zz * zz), seventh(z, zz, S0, S1, S2, S3, S4, S5, S6, S7))
    small = fma(t, p, t)
    v = (t if t < ERF_END else ERF_END) - 1.0
    vv = v * v
    eighth = (vv * vv) * (vv * vv)
    q = fma(fma(fma(Q18, v, Q17), v, Q16), eighth, seventh(v, vv, Q8, Q9, Q10, Q11, Q12, Q13, Q14, Q15))
    q = fma(q, eighth, seventh(v, vv, Q0, Q1, Q2, Q3, Q4, Q5, Q6, Q7))
    large = 1.0 - exp_of(-q, 0.0)
    y = small if t < 1.0 else large
    y = 0.0 if t < TINY else y
    return signed_as(y, x) if x == x else x


sin, cos = angles.sin, angles.cos
sin_near, cos_near = angles.sin_near, angles.cos_near
