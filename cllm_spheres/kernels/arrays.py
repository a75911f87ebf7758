"""An address -> an array over it; and a few row operations that the other kernels share."""

from __future__ import annotations

import numpy as np
from numba import carray, types

from cllm_spheres.crystal import lanes as L
from cllm_spheres.crystal.functions.exponential import exp
from cllm_spheres.crystal.jit import kernel, pointer
from cllm_spheres.crystal.lanes import load, over, spread, store, vectorised

f4 = np.float32
_i8, _f4 = types.int64, types.float32
_LOWEST = float(np.finfo(np.float32).min)


@kernel
def floats(address, n):
    """float32[n] at an address."""
    return carray(pointer(address), n, np.float32)


@kernel
def matrix(address, rows, columns):
    """float32[rows, columns] at an address, rows contiguous."""
    return carray(pointer(address), (rows, columns), np.float32)


@kernel
def doubles(address, n):
    """float64[n] at an address."""
    return carray(pointer(address), n, np.float64)


@kernel
def integers(address, n):
    """int64[n] at an address."""
    return carray(pointer(address), n, np.int64)


@kernel
def tokens(address, n):
    """int32[n] at an address."""
    return carray(pointer(address), n, np.int32)


@vectorised(_i8, _i8, result=_f4)
def _row_max(b, row, n):
    best = L.variable(b, spread(b, _LOWEST))

    def take(at, mask):
        x = load(b, row, at, mask)
        x = x if mask is None else x.where(mask, _LOWEST)
        b.store(x.larger(L.Lanes(b, b.load(best))).value, best)

    over(b, n, take)
    return L.largest(L.Lanes(b, b.load(best)))


@vectorised(_i8, _i8, _f4, _f4, result=_f4)
def _exp_of_difference(b, row, n, shift, scale):
    low, wide, sums = spread(b, shift), spread(b, scale), L.variable(b, spread(b, 0.0))

    def take(at, mask):
        e = exp((load(b, row, at, mask) - low) * wide)
        store(e, row, at, mask)
        e = e if mask is None else e.where(mask, 0.0)
        b.store((L.Lanes(b, b.load(sums)) + e).value, sums)

    over(b, n, take)
    return L.total(L.Lanes(b, b.load(sums)))


@vectorised(_i8, _i8, _i8, result=_f4)
def _dot(b, x, y, n):
    sums = L.variable(b, spread(b, 0.0))

    def take(at, mask):
        now = load(b, x, at, mask).times_plus(load(b, y, at, mask), L.Lanes(b, b.load(sums)))
        b.store(now.value, sums)

    over(b, n, take)
    return L.total(L.Lanes(b, b.load(sums)))


@vectorised(_i8, _i8, result=_f4)
def _row_sum(b, row, n):
    sums = L.variable(b, spread(b, 0.0))
    over(b, n, lambda at, mask: b.store((L.Lanes(b, b.load(sums)) + load(b, row, at, mask)).value, sums))
    return L.total(L.Lanes(b, b.load(sums)))


@vectorised(_i8, _i8, _f4)
def _shift_row(b, row, n, addend):
    wide = spread(b, addend)
    over(b, n, lambda at, mask: store(load(b, row, at, mask) + wide, row, at, mask))


@vectorised(_i8, _i8, _f4)
def _scale_row(b, row, n, factor):
    wide = spread(b, factor)
    over(b, n, lambda at, mask: store(load(b, row, at, mask) * wide, row, at, mask))


@vectorised(_i8, _i8, _i8)
def copy_floats(b, source, target, n):
    """n float32 from an address to another: an array's slice would bring the text of an error with it, and log10."""
    over(b, n, lambda at, mask: store(load(b, source, at, mask), target, at, mask))


@kernel
def row_max(row):
    """The largest element of a contiguous float32 row; NaN is passed over (exp(x - max) keeps it)."""
    return _row_max(row.ctypes.data, row.size)


@kernel
def exp_of_difference(row, shift, scale, n):
    """row[:n] = exp((row[:n] - shift) * scale) in place, for results of at most e**88; the sum of what was written."""
    return _exp_of_difference(row.ctypes.data, n, shift, scale)


@kernel
def dot(x, y):
    """Sum of x * y over two rows."""
    return _dot(x.ctypes.data, y.ctypes.data, x.size)


@kernel
def row_sum(row):
    """The sum of a contiguous float32 row, in an order of its own."""
    return _row_sum(row.ctypes.data, row.size)


@kernel
def shift_row(row, addend):
    """row += addend."""
    _shift_row(row.ctypes.data, row.size, addend)


@kernel
def scale_row(row, factor, n):
    """row[:n] *= factor."""
    _scale_row(row.ctypes.data, n, factor)


@kernel
def add_rows(dout_NC, db_C, accumulate):
    """db_C (+)= the sum of the rows of dout_NC, in row order; `accumulate` false overwrites."""
    if not accumulate:
        db_C[:] = f4(0)
    for i in range(dout_NC.shape[0]):
        row = dout_NC[i]
        for j in range(row.size):
            db_C[j] += row[j]
