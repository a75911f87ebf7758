"""Layer normalisation over the channels of each row. N rows, C channels; a bias of length 0 means there is none.

Source: Ba, Kiros, Hinton, Layer Normalization (2016). Epsilon 1e-5, as in GPT-2.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.core import cgutils

from cllm_spheres.crystal import lanes as L
from cllm_spheres.crystal.jit import kernel
from cllm_spheres.crystal.lanes import load, over, spread, store, vectorised
from cllm_spheres.kernels.arrays import f4

EPSILON = f4(1e-5)
_i8, _f4 = types.int64, types.float32


@vectorised(_i8, _i8, result=_f4)
def _sum(b, x, n):
    sums = L.variable(b, spread(b, 0.0))
    over(b, n, lambda at, mask: b.store((L.Lanes(b, b.load(sums)) + load(b, x, at, mask)).value, sums))
    return L.total(L.Lanes(b, b.load(sums)))


@vectorised(_i8, _i8, _f4, result=_f4)
def _sum_of_squares(b, x, n, mean):
    sums, centre = L.variable(b, spread(b, 0.0)), spread(b, mean)

    def take(at, mask):
        d = load(b, x, at, mask) - centre
        d = d if mask is None else d.where(mask, 0.0)
        b.store(d.times_plus(d, L.Lanes(b, b.load(sums))).value, sums)

    over(b, n, take)
    return L.total(L.Lanes(b, b.load(sums)))


@vectorised(_i8, _i8, _i8, _i8, _i8, _f4, _f4)
def _normalise(b, x, gain, bias, out, n, mean, rstd):
    """out = (x - mean) * rstd * gain + bias; bias 0: none."""
    centre, wide = spread(b, mean), spread(b, rstd)
    has_bias = b.icmp_signed("!=", bias, L.constant(0))

    def take(at, mask):
        y = (load(b, x, at, mask) - centre) * wide * load(b, gain, at, mask)
        store(y, out, at, mask)
        with b.if_then(has_bias):
            store(y + load(b, bias, at, mask), out, at, mask)

    over(b, n, take)


@vectorised(_i8, _i8, _i8, _i8, _f4, _f4, result=types.UniTuple(_f4, 2))
def _gradient_sums(b, dout, x, gain, n, mean, rstd):
    """Sums of dout * gain and of dout * gain * normed."""
    centre, wide = spread(b, mean), spread(b, rstd)
    plain, weighted = (L.variable(b, spread(b, 0.0)) for _ in range(2))

    def take(at, mask):
        t = load(b, dout, at, mask) * load(b, gain, at, mask)
        normed = (load(b, x, at, mask) - centre) * wide
        b.store((L.Lanes(b, b.load(plain)) + t).value, plain)
        b.store(t.times_plus(normed, L.Lanes(b, b.load(weighted))).value, weighted)

    over(b, n, take)
    return cgutils.pack_array(b, [L.total(L.Lanes(b, b.load(place))) for place in (plain, weighted)])


@vectorised(*[_i8] * 7, *[_f4] * 4)
def _gradients(b, dout, x, gain, dx, dgain, dbias, n, mean, rstd, plain, weighted):
    """dx, dgain and dbias (0: none) grow by what one row gives."""
    centre, wide, first, second = (spread(b, y) for y in (mean, rstd, plain, weighted))
    has_bias = b.icmp_signed("!=", dbias, L.constant(0))

    def take(at, mask):
        d = load(b, dout, at, mask)
        normed = (load(b, x, at, mask) - centre) * wide
        store(d.times_plus(normed, load(b, dgain, at, mask)), dgain, at, mask)
        g = d * load(b, gain, at, mask) - first - normed * second
        store(g.times_plus(wide, load(b, dx, at, mask)), dx, at, mask)
        with b.if_then(has_bias):
            store(load(b, dbias, at, mask) + d, dbias, at, mask)

    over(b, n, take)


@kernel
def layernorm_forward(x_NC, gain_C, bias_C, out_NC, mean_N, rstd_N):
    """out = (x - mean) / sqrt(var + eps) * gain + bias; overwrites out, mean_N and rstd_N = 1/sqrt(var + eps)."""
    n = x_NC.shape[1]
    inverse = f4(1) / f4(n)
    bias = bias_C.ctypes.data if bias_C.size > 0 else 0
    for i in range(x_NC.shape[0]):
        x = x_NC[i].ctypes.data
        mean = _sum(x, n) * inverse
        rstd = f4(1) / np.sqrt(_sum_of_squares(x, n, mean) * inverse + EPSILON)
        mean_N[i], rstd_N[i] = mean, rstd
        _normalise(x, gain_C.ctypes.data, bias, out_NC[i].ctypes.data, n, mean, rstd)


@kernel
def layernorm_backward(dout_NC, x_NC, gain_C, mean_N, rstd_N, dx_NC, dgain_C, dbias_C, accumulate):
    """Adds to dx; dgain and dbias: `accumulate` false overwrites.

    dx += rstd * (g - mean(g) - normed * mean(g * normed)), g = dout * gain, normed = (x - mean) * rstd.
    """
    n = x_NC.shape[1]
    inverse = f4(1) / f4(n)
    if not accumulate:
        dgain_C[:] = f4(0)
        dbias_C[:] = f4(0)
    gain, dgain, dbias = gain_C.ctypes.data, dgain_C.ctypes.data, dbias_C.ctypes.data if dbias_C.size > 0 else 0
    for i in range(x_NC.shape[0]):
        x, dout, mean, rstd = x_NC[i].ctypes.data, dout_NC[i].ctypes.data, mean_N[i], rstd_N[i]
        plain, weighted = _gradient_sums(dout, x, gain, n, mean, rstd)
        _gradients(
            dout, x, gain, dx_NC[i].ctypes.data, dgain, dbias, n, mean, rstd, plain * inverse, weighted * inverse
        )
