"""Rounding to bfloat16, and the four forms, against twins that place the elements one by one."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest

from tests.kernels.bf16.twins import FORMS, UNWRITTEN, form_of, from_bits, matrix_of, padded, room, survives, to_bits

from cllm_spheres.crystal.jit import kernel  # isort: skip
from cllm_spheres.kernels.bf16 import tiles as T  # isort: skip
from cllm_spheres.kernels.bf16.linear import rows_of, turn  # isort: skip

SIZES = [(32, 32), (64, 32), (32, 96), (1, 1), (31, 33), (33, 31), (70, 65), (96, 100)]


@kernel
def round_row(row, line, groups, step):
    T.round_row(row, line, groups, step)


@kernel
def round_part(source, line, count):
    T.round_part(source, line, count)


@kernel
def widen_row(line, row, groups, step):
    T.widen_row(line, row, groups, step)


@kernel
def transpose_block(block):
    T.transpose_block(block.ctypes.data)


def every_kind_of_float(rng):
    """2**16 floats: all exponents and signs, and behind the bits that stay all the ways in which the rest may round."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    lower = rng.choice(np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234], np.uint32), 2**16)
    return (upper | lower).view(np.float32)


def test_the_twin_rounds_to_the_nearest_and_ties_to_even():
    one, bit = 1.0, 2**-7
    cases = {one: one, one + bit / 2: one, one + 1.5 * bit: one + 2 * bit, one + 0.51 * bit: one + bit, -1.003: -1.0,
             3.4e38: np.inf, np.inf: np.inf, -np.inf: -np.inf, 1e-39: 0.0, -0.0: 0.0, 2.0**-126: 2.0**-126}  # fmt: skip
    for x, expected in cases.items():
        assert from_bits(to_bits(np.array([x])))[0] == expected, x
    assert np.isnan(from_bits(to_bits(np.array([np.nan])))).all()


def assert_rounded(bits, x):
    """To the bit, but for NaN, of which there are many."""
    nan = np.isnan(x)
    assert np.isnan(from_bits(bits[nan])).all()
    assert (bits[~nan] == to_bits(x)[~nan]).all()


@pytest.mark.parametrize("step", [64, 1024, 1088])
def test_a_row_is_rounded_to_the_bit_and_nothing_else_is_written(step, rng):
    x = every_kind_of_float(rng)
    for groups in (1, 3, x.size // 32):
        source = x[: 32 * groups]
        with room((groups - 1) * step // 2 + 32) as lines:
            round_row(source.ctypes.data, lines.ctypes.data, groups, step)
            ours = np.arange(lines.size) % (step // 2) < 32
            assert_rounded(lines[ours], source)
            assert (lines[~ours] == UNWRITTEN).all()


@pytest.mark.parametrize("count", range(33))
def test_a_part_of_a_row_is_rounded_and_the_rest_of_its_line_is_zero(count, rng):
    x = np.full(40, np.nan, np.float32)
    x[:count] = rng.choice(every_kind_of_float(rng), count)
    with room(32) as line:
        round_part(x.ctypes.data, line.ctypes.data, count)
        assert_rounded(line[:count], x[:count])
        assert (line[count:] == 0).all()


def test_nothing_is_read_beyond_the_part_of_a_row(rng):
    pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    whole = np.frombuffer(pages, np.float32)
    end = mmap.PAGESIZE // 4
    whole[:end] = 1
    line = np.zeros(64, np.uint16)
    round_part(whole.ctypes.data, line.ctypes.data, 32)  # compiled before the fork
    guard = ctypes.c_void_p(whole.ctypes.data + mmap.PAGESIZE)
    # PROT_NONE: the second page cannot be read
    assert ctypes.CDLL(None, use_errno=True).mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    for count in range(33):
        assert survives(lambda n=count: round_part(whole[end - n :].ctypes.data, line.ctypes.data, n)), count
    assert not survives(lambda: round_part(whole[end - 1 :].ctypes.data, line.ctypes.data, 2))  # the guard is one


@pytest.mark.parametrize("step", [64, 1024])
def test_widening_gives_back_every_bfloat16(step, buffer):
    bits = np.arange(2**16, dtype=np.uint16)
    groups = bits.size // 32
    lines = np.full((groups, step // 2), UNWRITTEN, np.uint16)
    lines[:, :32] = bits.reshape(groups, 32)
    row = buffer(bits.size)
    widen_row(lines.ctypes.data, row.ctypes.data, groups, step)
    assert (row.view(np.uint32) == bits.astype(np.uint32) << 16).all()


@pytest.mark.parametrize(("n", "c"), SIZES)
def test_every_form_equals_its_twin_and_its_padding_is_zero(n, c, rng):
    x = rng.standard_normal((n, c), np.float32)
    tall, wide = padded(n), padded(c)
    size = tall * wide
    with room(size) as rows, room(size) as flipped, room(size) as pairs, room(size) as columns:
        rows[...] = 0  # rows_of writes the rows that there are
        rows_of(x, rows.ctypes.data, wide)
        assert (rows == form_of("rows", x)).all()
        T.flip(rows.ctypes.data, flipped.ctypes.data, size // 512)
        assert (flipped == form_of("flipped", x)).all()
        turn.call(rows.ctypes.data, tall, wide, pairs.ctypes.data, 0)
        assert (pairs == form_of("pairs", x)).all()
        turn.call(rows.ctypes.data, tall, wide, columns.ctypes.data, 1)
        assert (columns == form_of("columns", x)).all()


def test_the_rows_form_takes_rows_up_to_their_end_and_no_further(rng):
    n, c = 5, 45
    x = np.full(n * c + 32, np.nan, np.float32)[: n * c].reshape(n, c)  # NaN behind the last row
    x[...] = rng.standard_normal((n, c), np.float32)
    with room(32 * 64) as rows:
        rows_of(x, rows.ctypes.data, 64)
        written = rows != UNWRITTEN
        assert written.sum() == n * 64
        rows[~written] = 0
        assert (rows == form_of("rows", x)).all()


def test_turning_a_tile_in_place_and_twice_gives_it_back(rng):
    x = rng.standard_normal((64, 96), np.float32)
    bits = form_of("rows", x)
    T.flip(bits.ctypes.data, bits.ctypes.data, bits.size // 512)
    assert (bits == form_of("flipped", x)).all()
    T.flip(bits.ctypes.data, bits.ctypes.data, bits.size // 512)
    assert (bits == form_of("rows", x)).all()
    bits = form_of("pairs", x)
    T.flip(bits.ctypes.data, bits.ctypes.data, bits.size // 512)
    assert (bits == form_of("columns", x)).all()


@pytest.mark.parametrize("form", FORMS)
def test_the_twins_forms_are_read_back(form, rng):
    x = rng.standard_normal((33, 65), np.float32)
    back = matrix_of(form, form_of(form, x), 64, 96)
    assert (back[:33, :65] == from_bits(to_bits(x))).all() and not back[33:].any() and not back[:, 65:].any()


def test_a_block_is_transposed_in_place(rng, buffer):
    block = buffer(32, 32)
    x = rng.standard_normal((32, 32), np.float32)
    block[...] = x
    transpose_block(block)
    assert (block == x.T).all()


@pytest.mark.parametrize("size", [1, 31, 32, 33, 1000, 1024])
def test_sizes_are_raised_to_32(size):
    assert T.padded(size) == padded(size) >= size
