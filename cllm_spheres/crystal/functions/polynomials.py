"""Polynomials in jitted code, by Estrin's scheme: pairs, then pairs of pairs, so that no step waits for all before it.

A CPU holds few turns of a long loop at a time: Horner's scheme left its units idle. Coefficients: the lowest first.
"""

from __future__ import annotations

from cllm_spheres.crystal.functions.bits import fma
from cllm_spheres.crystal.jit import element


@element
def cubic(x, xx, a, b, c, d):
    """a + b x + c x**2 + d x**3; xx = x * x."""
    return fma(fma(d, x, c), xx, fma(b, x, a))


@element
def seventh(x, xx, a, b, c, d, e, f, g, h):
    """a + b x + ... + h x**7; xx = x * x."""
    return fma(cubic(x, xx, e, f, g, h), xx * xx, cubic(x, xx, a, b, c, d))
