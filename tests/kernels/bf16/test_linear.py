"""The linear layer's four endings, its other helpers, and layer normalisation into tiles, against float64 of the same
bfloat16s.

A result in float32 keeps FLOAT32. One that is rounded to bfloat16 at the end may be off by BF16 of itself besides.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests import naive
from tests.check import assert_close
from tests.kernels import masks
from tests.kernels.bf16.twins import (
    BF16,
    FLOAT32,
    UNWRITTEN,
    form_of,
    from_bits,
    matrix_of,
    padded,
    places,
    room,
    rounded,
    tiles,
)

from cllm_spheres.kernels.bf16 import linear  # isort: skip
from cllm_spheres.kernels.bf16.norm import layernorm_rows  # isort: skip
from cllm_spheres.kernels.bf16.sizes import SWEEP  # isort: skip

# m (padded), n, inner: less than a sweep of columns, just one, more than one with a rest that is no multiple of 32
SIZES = [(32, 1, 1), (64, 40, 33), (32, SWEEP, 64), (96, 2 * SWEEP + 45, 70)]
THRESHOLD = 2**30  # a quarter is dropped
KEEP = float(np.float32(1 / (1 - THRESHOLD / 2**32)))


def inputs(rng, m, n, inner, bias, size=1.0):
    """a[m, inner], w[inner, n] of a given size and the bias, and their product in float64."""
    a, w = rng.standard_normal((m, inner), np.float32), rng.standard_normal((inner, n), np.float32)
    w *= np.float32(size)
    b = rng.standard_normal(n if bias else 0, np.float32)
    return a, w, b, naive.linear_forward(rounded(a), rounded(w), b.astype(float) if bias else 0.0)


def project(ending, a, w, bias, first, second, columns, keys=0, length=0, threshold=0, keep_scale=0.0):
    scratch = np.full(32 * SWEEP, np.nan, np.float32)
    a_form, w_form = form_of("rows", a), form_of("pairs", w)
    with tiles():
        linear.project.call(
            ending, a.shape[0], w.shape[1], padded(a.shape[1]), a_form.ctypes.data, w_form.ctypes.data,
            bias.ctypes.data if bias.size else 0, first, second, columns, scratch.ctypes.data, keys, length, threshold,
            keep_scale,
        )  # fmt: skip


def assert_bfloat16(found, expected):
    """Rounded once, from a float32 sum."""
    bound = BF16 * np.abs(expected) + FLOAT32 * np.abs(expected).max()
    assert (np.abs(found - expected) <= bound).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "n", "inner"), SIZES)
def test_to_rows_equals_its_twin_and_its_padding_is_zero(m, n, inner, bias, rng):
    a, w, b, expected = inputs(rng, m, n, inner, bias)
    wide = padded(n)
    with room(m * wide) as form:
        project(linear.TO_ROWS, a, w, b, form.ctypes.data, 0, wide)
        found = matrix_of("rows", form, m, wide)
    assert_bfloat16(found[:, :n], expected)
    assert not found[:, n:].any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "n", "inner"), SIZES)
def test_to_gelu_equals_its_twin_before_and_after(m, n, inner, bias, rng):
    a, w, b, expected = inputs(rng, m, n, inner, bias, size=1 / np.sqrt(inner))
    wide = padded(n)
    with room(m * wide) as before, room(m * wide) as after:
        project(linear.TO_GELU, a, w, b, before.ctypes.data, after.ctypes.data, wide)
        forms = [matrix_of("rows", form, m, wide) for form in (before, after)]
        with room(m * wide) as again:
            linear.gelu_of(before.ctypes.data, m * wide, again.ctypes.data)
            assert (again == after).all()  # to the bit, as a backward pass that computes it again relies on
    # The GELU is that of the sum as it was rounded: of what stands in `before`.
    for found, twin in zip(forms, (expected, naive.gelu_forward(forms[0][:, :n])), strict=True):
        assert_bfloat16(found[:, :n], twin)
        assert not found[:, n:].any()


@pytest.mark.parametrize("threshold", [0, THRESHOLD])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "n", "inner"), SIZES)
def test_to_residual_equals_its_twin_with_each_sequences_own_dropout(m, n, inner, bias, threshold, rng, buffer):
    a, w, b, expected = inputs(rng, m, n, inner, bias)
    residual, out = rng.standard_normal((m, n), np.float32), buffer(m, n)
    length = 32  # padded rows of a sequence
    keys = rng.integers(0, 2**64, m // length, np.uint64)
    project(
        linear.TO_RESIDUAL, a, w, b, residual.ctypes.data, out.ctypes.data, n, keys.ctypes.data, length, threshold, KEEP
    )
    kept = 1.0
    if threshold:
        kept = np.concatenate([masks.mask(int(key), (length, n), threshold) for key in keys])
        assert m * n < 100 or 0.6 < (kept > 0).mean() < 0.9
    assert_close(out, residual + expected * kept)


def test_a_residual_may_be_added_to_where_it_lies(rng, buffer):
    a, w, b, expected = inputs(rng, 64, 40, 33, True)
    out = buffer(64, 40)
    out[...] = residual = rng.standard_normal((64, 40), np.float32)
    project(linear.TO_RESIDUAL, a, w, b, out.ctypes.data, out.ctypes.data, 40, 0, 32)
    assert_close(out, residual + expected)


@pytest.mark.parametrize(("m", "n", "inner"), SIZES)
def test_through_gelu_equals_its_twin_and_adds_its_column_sums(m, n, inner, rng, buffer):
    a, w, b, dout = inputs(rng, m, n, inner, False)
    before = 2 * rng.standard_normal((m, n), np.float32)
    expected = naive.gelu_backward(dout, rounded(before))
    wide = padded(n)
    totals = buffer(wide, fill=5)
    before_form = form_of("rows", before)
    with room(m * wide) as form:
        project(
            linear.THROUGH_GELU, a, w, b, before_form.ctypes.data, form.ctypes.data, wide,
            totals.ctypes.data,
        )  # fmt: skip
        found = matrix_of("rows", form, m, wide)
    assert_bfloat16(found[:, :n], expected)
    assert not found[:, n:].any()
    added = expected.sum(0)
    # The sums are of numbers that partly cancel: they are compared on the scale of their terms.
    assert np.abs(totals[:n] - 5 - added).max() <= FLOAT32 * (5 + np.abs(expected).sum(0).max())
    assert (totals[n:] == 5).all()


def saturating(m, n):
    """Numbers from -40 to 40, beyond which a GELU is 0 or x; the exponential in it leaves float32 at 10.1."""
    return np.linspace(-40, 40, m * n, dtype=np.float32).reshape(m, n)


def test_a_gelu_saturates(rng):
    m, n = 32, 64
    x, eye, nothing = saturating(m, n), np.eye(m, dtype=np.float32), np.zeros(0, np.float32)
    for size in (1, 1e3, 1e8):
        with room(m * n) as before, room(m * n) as after:
            project(linear.TO_GELU, eye, np.float32(size) * x, nothing, before.ctypes.data, after.ctypes.data, n)
            found = matrix_of("rows", after, m, n)
        given = rounded(np.float32(size) * x)
        expected = np.where(np.abs(given) > 40, np.maximum(given, 0), naive.gelu_forward(np.clip(given, -40, 40)))
        assert (np.abs(found - expected) <= BF16 * np.abs(expected) + 1e-6).all(), size


def test_the_slope_of_a_gelu_saturates_and_the_gradient_may_take_its_place(rng):
    m, n, inner = 32, 64, 33
    a, w, b, dout = inputs(rng, m, n, inner, False)
    before = saturating(m, n)
    form, before_form = form_of("rows", np.full((m, n), 7)), form_of("rows", before)
    sums = np.zeros(padded(n), np.float32)
    project(linear.THROUGH_GELU, a, w, b, before_form.ctypes.data, form.ctypes.data, n, sums.ctypes.data)
    assert_bfloat16(matrix_of("rows", form, m, n), naive.gelu_backward(dout, rounded(before)))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [((3, 4), (1, 5)), ((1, 7), (4, 3)), ((2, 33), (3, 40))])
def test_padded_heads_are_gathered(rows, columns, accumulate, rng, buffer):
    """rows, columns: the number of groups, and the size of each."""
    row_step, column_step = padded(rows[1]), padded(columns[1])
    wide = rng.standard_normal((rows[0] * row_step, columns[0] * column_step), np.float32)
    shape = rows[0] * rows[1], columns[0] * columns[1]
    out = buffer(*shape, fill=2 if accumulate else np.nan)
    linear.gather_heads(
        wide.ctypes.data, wide.shape[1], rows[1], row_step, columns[1], column_step, out, accumulate
    )  # fmt: skip
    expected = wide.reshape(rows[0], row_step, columns[0], column_step)[:, : rows[1], :, : columns[1]].reshape(shape)
    assert_close(out, expected + 2 * accumulate)


@pytest.mark.parametrize(("n", "c"), [(32, 5), (64, 32), (32, 70)])
def test_the_column_sums_of_a_form_are_added(n, c, rng, buffer):
    x, wide = rng.standard_normal((n, c), np.float32), padded(c)
    sums, row, form = buffer(c, fill=3), buffer(wide), form_of("rows", x)
    linear.add_form_rows(form.ctypes.data, n, wide, c, sums, row.ctypes.data)
    assert_close(sums, 3 + rounded(x).sum(0))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "c"), [(1, 2), (5, 32), (40, 45), (33, 100)])
def test_layer_normalisation_goes_into_rows(n, c, bias, rng, buffer):
    x = 3 * rng.standard_normal((n, c), np.float32) + 1
    gain, shift = rng.standard_normal(c, np.float32), rng.standard_normal(c if bias else 0, np.float32)
    wide, tall = padded(c), padded(n)
    mean, rstd, row = buffer(n), buffer(n), buffer(wide)
    with room(tall * wide) as form:
        layernorm_rows(x, gain, shift, form.ctypes.data, mean, rstd, row)
        at = places("rows", tall, wide)
        assert (form[at[n:]] == UNWRITTEN).all()
        found = from_bits(form[at[:n]])
    wide_x = x.astype(float)
    assert_bfloat16(found[:, :c], naive.layernorm_forward(wide_x, gain, shift if bias else 0.0))
    assert not found[:, c:].any()
    assert_close(mean, wide_x.mean(-1), FLOAT32)
    assert_close(rstd, naive.normed(wide_x)[1][:, 0], FLOAT32)
