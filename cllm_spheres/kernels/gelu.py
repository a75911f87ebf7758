"""GELU in its tanh form, elementwise. Source: Hendrycks and Gimpel, Gaussian Error Linear Units (2016).

gelu(x) = x/2 (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3), which is x * sigmoid(2u).
"""

from __future__ import annotations

import math

from numba import types

from cllm_spheres.crystal.functions.exponential import EXP_LOW, exp
from cllm_spheres.crystal.jit import kernel
from cllm_spheres.crystal.lanes import Lanes, load, over, reciprocal, spread, store, vectorised

_i8 = types.int64
_TWICE, _CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715


def gelu_lanes(x: Lanes) -> Lanes:
    """gelu(x), for the code generation of other kernels too."""
    return x * _sigmoid(x)


def gelu_slope_lanes(x: Lanes) -> Lanes:
    """gelu'(x): with s = sigmoid(2u), s + x s (1 - s) d(2u)/dx."""
    s = _sigmoid(x)
    slope = (x * x).times_plus(3 * _CUBIC, 1.0) * _TWICE
    return (x * s * (spread(x.b, 1.0) - s)).times_plus(slope, s)


def _sigmoid(x: Lanes) -> Lanes:
    """1 / (1 + exp(-2u)); 0 where that is below the normal range."""
    z = (x * x).times_plus(_CUBIC, 1.0) * x * -_TWICE
    return spread(x.b, 0.0).where(spread(x.b, -EXP_LOW).less(z), reciprocal(exp(z) + 1.0))


@vectorised(_i8, _i8, _i8)
def _forward(b, x, out, n):
    over(b, n, lambda at, mask: store(gelu_lanes(load(b, x, at, mask)), out, at, mask))


@vectorised(_i8, _i8, _i8)
def _backward(b, x, dout, n):
    over(b, n, lambda at, mask: store(load(b, dout, at, mask) * gelu_slope_lanes(load(b, x, at, mask)), dout, at, mask))


@kernel
def gelu_forward(x_N, out_N):
    """out = gelu(x); overwrites out."""
    _forward(x_N.ctypes.data, out_N.ctypes.data, x_N.size)


@kernel
def gelu_backward(x_N, dout_N):
    """dout *= gelu'(x), in place."""
    _backward(x_N.ctypes.data, dout_N.ctypes.data, x_N.size)
