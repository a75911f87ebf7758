"""e**x of float32, sixteen at a time in the kernels and one in single.py: `Lanes` -> `Lanes`, one algorithm, same bits.

Errors, special values and speeds stand in docs/crystal.md, "Functions". No product stands alone beside a sum, so that
kernels, whose compiler may fuse the two, get the same bits. The coefficients are a minimax fit of the relative error by
Remez's exchange, in 50 digits.
"""

from __future__ import annotations

import numpy as np

from cllm_spheres.crystal.lanes import Lanes

f4 = np.float32
ROUND = f4(1.5 * 2.0**23)  # adding it rounds to a whole number, which then stands in the low bits
LOG2_E = f4(1.4426950408889634)
LN2_1, LN2_2 = f4(0.6931471824645996), f4(-1.904654323148236e-09)
EXP_LOW, EXP_HIGH = f4(-87.336548), f4(88.72284)  # e**x is a normal number between them, and at neither
E0, E1, E2, E3, E4 = f4(0.49999994), f4(0.1666652), f4(0.041668393), f4(0.00836878), f4(0.0013814467)


def exp_of(x: Lanes) -> Lanes:
    """e**x where it is a normal number: elsewhere nonsense. The method is that of `exp_parts` in double.py."""
    rounded = x.times_plus(LOG2_E, ROUND)
    n = rounded - ROUND
    first = n.times_plus(-LN2_1, x)
    r = n.times_plus(-LN2_2, first)
    rest = n.times_plus(-LN2_2, first - r)
    z = r * r
    p = z.times_plus(r.times_plus(E3, E2), r.times_plus(E1, E0))
    p = (z * z).times_plus(E4, p)
    one = r + 1.0
    tail = (r - (one - 1.0)) + rest
    return (z.times_plus(p, tail) + one).scaled(rounded)


def exp(x: Lanes) -> Lanes:
    """e**x: 0 where it is below the normal range, inf where above; NaN stays NaN."""
    y = exp_of(x).where(x.less(EXP_HIGH), np.inf)
    below = x.filled(0.0).larger(x)  # NaN where x is NaN, as no comparison holds then
    return y.where(x.filled(EXP_LOW).less(x), below)
