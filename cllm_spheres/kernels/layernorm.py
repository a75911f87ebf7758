"""Layer normalisation over the channels of each row. N rows, C channels; a bias of length 0 means there is none.

Source: Ba, Kiros, Hinton, Layer Normalization (2016). Epsilon 1e-5, as in GPT-2.
"""

from __future__ import annotations

import numpy as np

from cllm_spheres.crystal.jit import kernel, reduction
from cllm_spheres.kernels.arrays import f4

EPSILON = f4(1e-5)


@reduction
def _sum(x):
    total = f4(0)
    for j in range(x.size):
        total += x[j]
    return total


@reduction
def _sum_of_squares(x, mean):
    total = f4(0)
    for j in range(x.size):
        d = x[j] - mean
        total += d * d
    return total


@reduction
def _gradient_sums(dout, x, gain, mean, rstd):
    """Sums of dout * gain and of dout * gain * normed."""
    plain, weighted = f4(0), f4(0)
    for j in range(x.size):
        t = dout[j] * gain[j]
        plain += t
        weighted += t * ((x[j] - mean) * rstd)
    return plain, weighted


@kernel
def layernorm_forward(x_NC, gain_C, bias_C, out_NC, mean_N, rstd_N):
    """out = (x - mean) / sqrt(var + eps) * gain + bias; overwrites out, mean_N and rstd_N = 1/sqrt(var + eps)."""
    inverse = f4(1) / f4(x_NC.shape[1])
    for i in range(x_NC.shape[0]):
        x, out = x_NC[i], out_NC[i]
        mean = _sum(x) * inverse
        rstd = f4(1) / np.sqrt(_sum_of_squares(x, mean) * inverse + EPSILON)
        mean_N[i], rstd_N[i] = mean, rstd
        if bias_C.size > 0:
            for j in range(x.size):
                out[j] = (x[j] - mean) * rstd * gain_C[j] + bias_C[j]
        else:
            for j in range(x.size):
                out[j] = (x[j] - mean) * rstd * gain_C[j]


@kernel
def layernorm_backward(dout_NC, x_NC, gain_C, mean_N, rstd_N, dx_NC, dgain_C, dbias_C, accumulate):
    """Adds to dx; dgain and dbias: `accumulate` false overwrites.

    dx += rstd * (g - mean(g) - normed * mean(g * normed)), g = dout * gain, normed = (x - mean) * rstd.
    """
    inverse = f4(1) / f4(x_NC.shape[1])
    if not accumulate:
        dgain_C[:] = f4(0)
        dbias_C[:] = f4(0)
    for i in range(x_NC.shape[0]):
        x, dout, dx, mean, rstd = x_NC[i], dout_NC[i], dx_NC[i], mean_N[i], rstd_N[i]
        plain, weighted = _gradient_sums(dout, x, gain_C, mean, rstd)
        plain *= inverse
        weighted *= inverse
        for j in range(x.size):
            normed = (x[j] - mean) * rstd
            dgain_C[j] += dout[j] * normed
            dx[j] += rstd * (dout[j] * gain_C[j] - plain - normed * weighted)
        if dbias_C.size > 0:
            for j in range(x.size):
                dbias_C[j] += dout[j]
