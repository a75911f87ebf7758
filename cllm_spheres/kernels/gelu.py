"""GELU in its tanh form, elementwise. Source: Hendrycks and Gimpel, Gaussian Error Linear Units (2016).

gelu(x) = x/2 (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3), which is x * sigmoid(2u).
"""

from __future__ import annotations

import math

from cllm_spheres.crystal.functions import exp
from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels.arrays import f4

_TWICE = f4(2 * math.sqrt(2 / math.pi))
_CUBIC, _CUBIC_3, _ONE = f4(0.044715), f4(3 * 0.044715), f4(1)


@kernel
def gelu_forward(x_N, out_N):
    """out = gelu(x); overwrites out."""
    for i in range(x_N.size):
        x = x_N[i]
        out_N[i] = x / (_ONE + exp(-_TWICE * (x + _CUBIC * x * x * x)))


@kernel
def gelu_backward(x_N, dout_N):
    """dout *= gelu'(x), in place. With s = sigmoid(2u): s + x s (1 - s) d(2u)/dx."""
    for i in range(x_N.size):
        x = x_N[i]
        s = _ONE / (_ONE + exp(-_TWICE * (x + _CUBIC * x * x * x)))
        dout_N[i] *= s + x * s * (_ONE - s) * (_TWICE * (_ONE + _CUBIC_3 * x * x))
