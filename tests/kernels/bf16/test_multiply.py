"""The product of two matrices in tiles, against float64 of the same bfloat16s; on AMX and, in another process, on
AVX-512."""

from __future__ import annotations

import types as python_types

import numba
import numpy as np
import pytest

from tests.kernels.bf16.twins import form_of, padded, rounded, tiles

from cllm_spheres.crystal.jit import OPTIONS, kernel  # isort: skip
from cllm_spheres.kernels.bf16 import multiply as M  # isort: skip
from cllm_spheres.kernels.bf16 import linear  # isort: skip

# m, n, inner: within one block, whole blocks, edges on one side and on both
SIZES = [(1, 1, 1), (32, 32, 32), (31, 33, 40), (64, 96, 64), (33, 32, 100), (32, 65, 31), (97, 70, 300)]
OPERANDS = [("rows", "pairs"), ("rows", "flipped"), ("columns", "pairs")]


@kernel
def block(count, a, a_step, b, b_step, c, c_step, accumulate):
    M.block(count, a, a_step, b, b_step, c, c_step, accumulate)


@kernel
def block_row(inner, a, a_step, b, first, count, out, columns):
    M.block_row(inner, a, a_step, b, first, count, out, columns)


@kernel
def product(m, n, inner, a, a_step, b, b_step, out, columns, accumulate, scratch):
    M.product(m, n, inner, a, a_step, b, b_step, out, columns, accumulate, scratch)


def operands(rng, m, n, inner, left="rows", right="pairs"):
    """a[m, inner] and b[inner, n], float32; each in the form that is named."""
    a, b = rng.standard_normal((m, inner), np.float32), rng.standard_normal((inner, n), np.float32)
    return a, b, form_of(left, a if left == "rows" else a.T), form_of(right, b if right == "pairs" else b.T)


def assert_product(found, a, b, start=0.0):
    """Element by element: the products of bfloat16s are exact in float32, and each of the sums rounds once."""
    a, b = rounded(a), rounded(b)
    bound = (a.shape[1] + 1) * 2**-24 * (np.abs(a) @ np.abs(b) + np.abs(start))
    # written so that a NaN fails
    assert (np.abs(found - (start + a @ b)) <= bound).all()


def run(m, n, inner, a_form, b_form, out, accumulate=False, of=product):
    """out[:m, :n] (+)= the product; out: its rows may be longer."""
    step, scratch = padded(inner) // 32 * 1024, np.full(32 * 32, np.nan, np.float32)
    with tiles():
        of(
            m, n, padded(inner), a_form.ctypes.data, step, b_form.ctypes.data, step, out.ctypes.data, out.shape[1],
            accumulate, scratch.ctypes.data,
        )  # fmt: skip


@pytest.mark.parametrize(("left", "right"), OPERANDS)
@pytest.mark.parametrize(("m", "n", "inner"), SIZES)
def test_a_product_equals_its_twin_whatever_the_sizes_and_the_forms(m, n, inner, left, right, rng, buffer):
    a, b, a_form, b_form = operands(rng, m, n, inner, left, right)
    out = buffer(m, n)
    run(m, n, inner, a_form, b_form, out)
    assert_product(out, a, b)


@pytest.mark.parametrize(("m", "n", "inner"), SIZES)
def test_a_product_is_added_where_that_is_wanted(m, n, inner, rng, buffer):
    a, b, a_form, b_form = operands(rng, m, n, inner)
    start = rng.standard_normal((m, n), np.float32)
    out = buffer(m, n)
    out[...] = start
    run(m, n, inner, a_form, b_form, out, accumulate=True)
    assert_product(out, a, b, start)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("m", "n", "inner"), SIZES)
def test_a_product_keeps_to_its_rows_and_columns_of_a_wider_matrix(m, n, inner, accumulate, rng, buffer):
    a, b, a_form, b_form = operands(rng, m, n, inner)
    out = buffer(m + 3, n + 37)
    out[:m, :n] = 0
    run(m, n, inner, a_form, b_form, out, accumulate)
    assert_product(out[:m, :n], a, b)
    assert np.isnan(out[m:]).all() and np.isnan(out[:, n:]).all()


@pytest.mark.parametrize(("m", "n", "inner"), SIZES)
def test_the_entry_is_the_same_product(m, n, inner, rng, buffer):
    _, _, a_form, b_form = operands(rng, m, n, inner)
    out, same, scratch = buffer(m, n), buffer(m, n), np.zeros(1024, np.float32)
    step = padded(inner) // 32 * 1024
    run(m, n, inner, a_form, b_form, out)
    with tiles():
        linear.multiply.call(
            m, n, padded(inner), a_form.ctypes.data, b_form.ctypes.data, step, same.ctypes.data, 0, scratch.ctypes.data
        )  # fmt: skip
    assert out.tobytes() == same.tobytes()


def test_the_bits_do_not_depend_on_how_the_blocks_are_ordered(rng, buffer):
    m, n, inner = 97, 300, 130
    _, _, a_form, b_form = operands(rng, m, n, inner)
    results = set()
    for bytes_at_a_time in (1, 4 * 1024 * 5 * 3, M.B_BYTES):  # one block of columns, three, all
        ours = vars(M) | {"B_BYTES": bytes_at_a_time}
        again = python_types.FunctionType(M.product.py_func.__code__, ours, "product")
        options = {name: value for name, value in OPTIONS.items() if name != "cache"}
        out = buffer(m, n)
        run(m, n, inner, a_form, b_form, out, of=numba.njit(**options, fastmath={"contract"})(again))
        results.add(out.tobytes())
    out = buffer(m, n)
    run(m, n, inner, a_form, b_form, out)
    assert results == {out.tobytes()}


def test_an_element_has_the_same_bits_in_any_place_and_beside_any_others(rng, buffer):
    m, n, inner = 70, 75, 96
    a, b, a_form, b_form = operands(rng, m, n, inner)
    whole = buffer(m, n)
    run(m, n, inner, a_form, b_form, whole)
    for i, j in ((0, 0), (69, 74), (31, 32), (64, 3)):
        row, column = np.ascontiguousarray(a[i : i + 1]), np.ascontiguousarray(b[:, j : j + 1])
        one = buffer(1, 1)
        run(1, 1, inner, form_of("rows", row), form_of("pairs", column), one)
        assert one[0, 0] == whole[i, j]


@pytest.mark.parametrize("accumulate", [0, 1])
@pytest.mark.parametrize("inner", [32, 96])
def test_a_block_equals_its_twin_and_keeps_to_itself(inner, accumulate, rng, buffer):
    a, b, a_form, b_form = operands(rng, 32, 32, inner)
    start = rng.standard_normal((32, 32), np.float32)
    out = buffer(34, 40)
    out[:32, :32] = start if accumulate else np.nan
    step = inner // 32 * 1024
    with tiles():
        block(inner // 32, a_form.ctypes.data, step, b_form.ctypes.data, step, out.ctypes.data, 160, accumulate)
    assert_product(out[:32, :32], a, b, start if accumulate else 0.0)
    assert np.isnan(out[32:]).all() and np.isnan(out[:, 32:]).all()


def test_a_row_of_blocks_begins_at_any_of_them(rng, buffer):
    inner = 64
    a, b, a_form, b_form = operands(rng, 32, 160, inner)
    out = buffer(32, 70)
    with tiles():
        block_row(inner, a_form.ctypes.data, 2048, b_form.ctypes.data, 2, 2, out.ctypes.data, 70)
    assert_product(out[:, :64], a, b[:, 64:128])
    assert np.isnan(out[:, 64:]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_reaches_its_row_and_no_other(bad, rng, buffer):
    m, n, inner = 40, 50, 70
    a, _, _, b_form = operands(rng, m, n, inner)
    a[35, 69] = bad
    out = buffer(m, n)
    run(m, n, inner, form_of("rows", a), b_form, out)
    assert not np.isfinite(out[35]).any() and np.isfinite(np.delete(out, 35, 0)).all()


def test_numbers_from_all_over_the_range_keep_their_size(rng, buffer):
    m, n, inner = 33, 34, 64
    a, b, _, _ = operands(rng, m, n, inner)
    a *= (10.0 ** rng.integers(-15, 15, (m, 1))).astype(np.float32)
    b *= (10.0 ** rng.integers(-15, 15, (1, n))).astype(np.float32)
    out = buffer(m, n)
    run(m, n, inner, form_of("rows", a), form_of("pairs", b), out)
    assert_product(out, a, b)
