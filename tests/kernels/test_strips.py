"""Products with weights that lie in strips."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_spheres.kernels.linear import linear_forward
from cllm_spheres.kernels.products import BACKEND
from cllm_spheres.kernels.sizes import ALIGN, TILE_COLUMNS, product_floats
from cllm_spheres.kernels.strips import (
    BUNDLE,
    bundle_floats,
    bundle_rows,
    multiply_strips,
    num_bundles,
    num_strips,
    pack_strips,
    strip_bytes,
)
from tests.check import assert_close

SIZES = [(1, 1, 1), (1, 48, 17), (2, 16, 32), (7, 13, 33), (14, 40, 65), (15, 33, 48), (40, 70, 129)]  # M, I, O
# bfloat16 keeps 8 bits: rounding to nearest is off by at most 2**-8 of each weight.
ROUNDED = 2.0**-8


def in_strips(w, transposed, halves, buffer):
    """A matrix [inputs, outputs] packed as the kernels want it, strip by strip."""
    inputs, outputs = w.shape
    strips = buffer(strip_bytes(inputs, outputs, halves) // 4)
    stored = np.ascontiguousarray(w.T) if transposed else w
    scratch = buffer(TILE_COLUMNS * (inputs + ALIGN)).ctypes.data
    for strip in range(num_strips(outputs)):
        pack_strips.call(
            stored.ctypes.data, inputs, outputs, transposed, halves, strips.ctypes.data, strip, strip + 1, scratch
        )
    return strips


def multiply(x, w, strips, halves, buffer, bias=None, start=None):
    (rows, inputs), outputs = x.shape, w.shape[1]
    bundles, out = buffer(bundle_floats(rows, inputs)), buffer(rows, outputs)
    for bundle in range(num_bundles(rows)):
        bundle_rows(x.ctypes.data, inputs, rows, bundle, bundles.ctypes.data)
    for strip in range(num_strips(outputs)):
        multiply_strips.call(
            bundles.ctypes.data, rows, inputs, strips.ctypes.data, halves, strip, strip + 1,
            0 if bias is None else bias.ctypes.data, 0 if start is None else start.ctypes.data, out.ctypes.data,
            outputs, 0, num_bundles(rows),
        )  # fmt: skip
    return out


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("m", "i", "o"), SIZES)
def test_a_product_equals_its_twin(m, i, o, transposed, rng, buffer):
    x, w = rng.standard_normal((m, i), np.float32), rng.standard_normal((i, o), np.float32)
    bias, start = rng.standard_normal(o, np.float32), rng.standard_normal((m, o), np.float32)
    strips = in_strips(w, transposed, False, buffer)
    expected = x.astype(float) @ w.astype(float)
    assert_close(multiply(x, w, strips, False, buffer), expected)
    assert_close(multiply(x, w, strips, False, buffer, bias, start), expected + bias + start)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("m", "i", "o"), SIZES)
def test_halves_are_the_weights_rounded_to_bfloat16(m, i, o, transposed, rng, buffer):
    x, w = rng.standard_normal((m, i), np.float32), rng.standard_normal((i, o), np.float32)
    rounded = to_bfloat16(w)
    assert np.abs(rounded - w).max() <= ROUNDED * np.abs(w).max()
    out = multiply(x, w, in_strips(w, transposed, True, buffer), True, buffer)
    assert np.array_equal(out, multiply(x, rounded, in_strips(rounded, transposed, False, buffer), False, buffer))


def to_bfloat16(x):
    """The twin: to nearest, of two equally near the one whose last bit is 0; found by trying both neighbours."""
    low = (x.view(np.int32) & np.int32(-65536)).view(np.float32)
    high = ((x.view(np.int32) & np.int32(-65536)) + np.int32(65536)).view(np.float32)
    to_low, to_high = np.abs(x.astype(float) - low), np.abs(high.astype(float) - x)
    low_is_even = (low.view(np.int32) >> 16) % 2 == 0
    return np.where((to_low < to_high) | ((to_low == to_high) & low_is_even), low, high)


def test_not_a_number_stays_one_in_halves(buffer):
    w = np.full((1, 4), np.nan, np.float32)
    w.view(np.int32)[0] = 0x7FFFFFFF, 0x7F800001, -1, 0x7F7FFFFF  # the last is the largest number: it becomes inf
    out = multiply(np.ones((1, 1), np.float32), w, in_strips(w, False, True, buffer), True, buffer)
    assert np.isnan(out[0, :3]).all() and np.isinf(out[0, 3])


def test_a_row_has_the_same_bits_in_any_bundle(rng, buffer):
    m, i, o = 3 * BUNDLE + 1, 37, 70
    x, w = rng.standard_normal((m, i), np.float32), rng.standard_normal((i, o), np.float32)
    for halves in (False, True):
        strips = in_strips(w, False, halves, buffer)
        together = multiply(x, w, strips, halves, buffer)
        for some in (slice(0, 1), slice(1, BUNDLE), slice(3, 3 * BUNDLE)):
            alone = multiply(np.ascontiguousarray(x[some]), w, strips, halves, buffer)
            assert np.array_equal(together[some], alone)


@pytest.mark.skipif(BACKEND != "avx512", reason="OpenBLAS adds in another order")
def test_the_bits_are_those_of_training(rng, buffer):
    m, i, o = 9, 700, 65
    x, w, b = (rng.standard_normal(size, np.float32) for size in ((m, i), (i, o), (o,)))
    out = buffer(m, o)
    at = [array.ctypes.data for array in (x, w, b)]
    linear_forward(m, i, o, *at, 0, out.ctypes.data, buffer(product_floats(m)).ctypes.data)
    assert np.array_equal(out, multiply(x, w, in_strips(w, False, False, buffer), False, buffer, bias=b))
