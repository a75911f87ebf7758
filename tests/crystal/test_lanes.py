"""Sixteen lanes at a time: every operation against numpy, in float64 where it rounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numba import types

from cllm_spheres.crystal import lanes as L
from cllm_spheres.crystal.functions import elementwise
from cllm_spheres.crystal.functions.exponential import exp
from cllm_spheres.crystal.jit import kernel

_i8, _f4 = types.int64, types.float32
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3e38, -3e38, 1.0, -1.0]


@L.vectorised(_i8, _i8)
def _exp(b, x, out):
    L.store(exp(L.load(b, x)), out)


@L.vectorised(_i8, _i8)
def _reciprocal(b, x, out):
    L.store(L.reciprocal(L.load(b, x)), out)


@L.vectorised(_i8, _i8, _i8, _i8)
def _times_plus(b, x, y, z, out):
    L.store(L.load(b, x).times_plus(L.load(b, y), L.load(b, z)), out)


@L.vectorised(_i8, _i8, _i8)
def _larger(b, x, y, out):
    L.store(L.load(b, x).larger(L.load(b, y)), out)


@L.vectorised(_i8, _i8, _i8)
def _arithmetic(b, x, y, out):
    p, q = L.load(b, x), L.load(b, y)
    for i, result in enumerate((p + q, p - q, p * q, p + 2.0, 2.0 * p, p - 0.5)):
        L.store(result, out, 64 * i)


@L.vectorised(_i8, _i8, _i8)
def _smaller_of(b, x, y, out):
    p, q = L.load(b, x), L.load(b, y)
    L.store(p.where(p.less(q), q), out)


@L.vectorised(_i8, result=_f4)
def _total(b, x):
    return L.total(L.load(b, x))


@L.vectorised(_i8, result=_f4)
def _largest(b, x):
    return L.largest(L.load(b, x))


@L.vectorised(_i8, _i8, _i8)
def _first(b, x, count, out):
    for half in range(2):
        kept = L.load(b, x, 64 * half).where(L.first_lanes(b, count, 16 * half), -7.0)
        L.store(kept, out, 64 * half)


@L.vectorised(_i8, _i8, _f4, _i8)
def _sum_with(b, x, count, start, out):
    """out[:16] = start + x[:16] + x[16:32] + ..., out[16] = start, out[17] = the first of the sums."""
    sums = L.variable(b, L.spread(b, start))
    with L.each(b, count) as loop:
        at = b.mul(loop.index, L.constant(64))
        b.store((L.Lanes(b, b.load(sums)) + L.load(b, x, at)).value, sums)
    now = L.Lanes(b, b.load(sums))
    L.store(now, out)
    L.store_number(b, start, out, 64)
    L.store_first(now, out, 68)


@kernel
def exps(x_N, out_N):
    for i in range(0, x_N.size, 16):
        _exp(x_N.ctypes.data + 4 * i, out_N.ctypes.data + 4 * i)


@kernel
def reciprocals(x_N, out_N):
    for i in range(0, x_N.size, 16):
        _reciprocal(x_N.ctypes.data + 4 * i, out_N.ctypes.data + 4 * i)


@kernel
def times_plus(x_N, y_N, z_N, out_N):
    for i in range(0, x_N.size, 16):
        _times_plus(
            x_N.ctypes.data + 4 * i, y_N.ctypes.data + 4 * i, z_N.ctypes.data + 4 * i, out_N.ctypes.data + 4 * i
        )


@kernel
def larger(x_N, y_N, out_N):
    for i in range(0, x_N.size, 16):
        _larger(x_N.ctypes.data + 4 * i, y_N.ctypes.data + 4 * i, out_N.ctypes.data + 4 * i)


@kernel
def smaller_of(x_16, y_16, out_16):
    _smaller_of(x_16.ctypes.data, y_16.ctypes.data, out_16.ctypes.data)


@kernel
def arithmetic(x_16, y_16, out_96):
    _arithmetic(x_16.ctypes.data, y_16.ctypes.data, out_96.ctypes.data)


@kernel
def total(x_16):
    return _total(x_16.ctypes.data)


@kernel
def largest(x_16):
    return _largest(x_16.ctypes.data)


@kernel
def first(x_32, count, out_32):
    _first(x_32.ctypes.data, count, out_32.ctypes.data)


@kernel
def sum_with(x_N, start, out_18):
    _sum_with(x_N.ctypes.data, x_N.size // 16, start, out_18.ctypes.data)


def sixteens(values):
    """The values as float32, the last one repeated up to a multiple of sixteen."""
    x = np.asarray(values, np.float32)
    return np.concatenate([x, np.repeat(x[-1:], -x.size % 16)])


def test_exp_has_the_bits_of_the_function_of_arrays(buffer):
    # every 1,021st pattern of all: a prime, so that all last digits come; and what stands at the borders
    borders = np.array([*SPECIAL, -87.336548, -87.33654, 88.72283, 88.72284, -1e30, 1e30], np.float32)
    x = sixteens(np.concatenate([np.arange(0, 2**32, 1021, np.int64).astype(np.uint32).view(np.float32), borders]))
    out = buffer(x.size)
    exps(x, out)
    expected = elementwise.exp(x)
    assert np.array_equal(np.isnan(out), np.isnan(x))
    assert out[~np.isnan(x)].tobytes() == expected[~np.isnan(x)].tobytes()  # signs of zeros too


def test_reciprocal_is_at_most_one_unit_off(rng, buffer):
    # from the smallest normal number to the largest with a normal reciprocal, which is what is promised
    x = sixteens(rng.standard_normal(4000) * 10.0 ** rng.integers(-36, 36, 4000))
    out = buffer(x.size)
    reciprocals(x, out)
    expected = (1 / x.astype(np.float64)).astype(np.float32)  # float64 is wide enough for a quotient of float32
    assert (np.abs(out.view(np.int32) - expected.view(np.int32)) <= 1).all()


def test_times_plus_rounds_once(rng, buffer):
    # The product of two 12-bit numbers is exact; less its rounded self it is what a second rounding would lose.
    x = sixteens(rng.standard_normal(4000))
    y = sixteens(rng.standard_normal(4000))
    z = -(x * y)
    out = buffer(x.size)
    times_plus(x, y, z, out)
    exact = x.astype(np.float64) * y.astype(np.float64) + z.astype(np.float64)  # 48 bits, less its upper half: exact
    assert (out == exact).all() and (out != 0).mean() > 0.9


def test_times_plus_and_special_numbers(buffer):
    x, y, z = np.meshgrid(*[np.array(SPECIAL, np.float32)] * 3, indexing="ij")
    x, y, z = (sixteens(values.reshape(-1)) for values in (x, y, z))
    out = buffer(x.size)
    times_plus(x, y, z, out)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = (x.astype(np.float64) * y.astype(np.float64) + z.astype(np.float64)).astype(np.float32)
    assert np.array_equal(out, expected, equal_nan=True)


def test_sums_differences_and_products_are_numpys(rng, buffer):
    x, y = (np.concatenate([rng.standard_normal(5, np.float32), values]) for values in (SPECIAL, SPECIAL[::-1]))
    x, y = x.astype(np.float32), y.astype(np.float32)
    out = buffer(96)
    arithmetic(x, y, out)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = np.concatenate([x + y, x - y, x * y, x + 2, 2 * x, x - np.float32(0.5)])
    assert np.array_equal(out, expected, equal_nan=True)


def test_the_larger_of_two_passes_over_a_nan_on_the_left_alone(buffer):
    x, y = (sixteens(values.reshape(-1)) for values in np.meshgrid(SPECIAL, SPECIAL, indexing="ij"))
    out = buffer(x.size)
    larger(x, y, out)
    # A NaN on the right is no larger than anything: the other is taken where the left is not larger.
    expected = np.where(x > y, x, y)
    assert np.array_equal(out, expected, equal_nan=True)
    assert np.array_equal(out[np.isnan(x)], y[np.isnan(x)], equal_nan=True) and np.isnan(out[np.isnan(y)]).all()


def test_where_takes_the_lanes_for_which_less_holds_and_nan_is_less_than_nothing(rng, buffer):
    x, y = rng.standard_normal(16, np.float32), rng.standard_normal(16, np.float32)
    x[3], y[9], x[5], y[5] = np.nan, np.nan, 1, 1
    out = buffer(16)
    smaller_of(x, y, out)
    assert np.array_equal(out, np.where(x < y, x, y), equal_nan=True)


def test_total_is_the_sum_of_all_lanes_in_one_order(rng):
    for _ in range(200):
        x = rng.standard_normal(16, np.float32)
        folded = x
        for half in (8, 4, 2, 1):
            folded = folded[:half] + folded[half : 2 * half]
        assert total(x) == folded[0]
        # four additions to each lane, half an ulp of at most the sum of the sizes each
        assert abs(total(x) - x.astype(float).sum()) <= 4 * 2**-24 * np.abs(x).sum()
    for place in range(16):
        x = np.zeros(16, np.float32)
        for value in (1, -np.inf, np.inf):
            x[place] = value
            assert total(x) == value
        x[place] = np.nan
        assert math.isnan(total(x))


def test_largest_is_the_largest_of_all_lanes(rng):
    for place in range(16):
        x = -np.abs(rng.standard_normal(16, np.float32)) - 1
        x[place] = -0.5
        assert largest(x) == -0.5
        x[place] = np.inf
        assert largest(x) == np.inf
    assert largest(np.full(16, -np.inf, np.float32)) == -np.inf


@pytest.mark.parametrize("count", range(33))
def test_the_first_lanes_are_counted_over_both_halves(count, rng, buffer):
    x, out = rng.standard_normal(32, np.float32), buffer(32)
    first(x, count, out)
    assert (out == np.where(np.arange(32) < count, x, -7)).all()


@pytest.mark.parametrize("groups", [0, 1, 5])
def test_a_loop_adds_to_a_variable_and_stores_where_it_is_told(groups, rng, buffer):
    x, out = rng.integers(-99, 99, 16 * groups).astype(np.float32), buffer(18)  # whole numbers: every sum is exact
    sum_with(x, np.float32(0.5), out)
    expected = 0.5 + x.reshape(groups, 16).sum(0)
    assert (out[:16] == expected).all() and out[16] == 0.5 and out[17] == expected[0]
