"""Segments -> gradient, its norm, and the factor of the clip."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels.gather import clip_factor, gather_block, global_norm, sum_block
from cllm_spheres.kernels.sizes import BLOCK
from tests import naive
from tests.check import assert_close


@kernel
def clip_factor_of(norm, clip):
    return clip_factor(norm, clip)


def gather(segments, out, norms, block):
    """A view of the sum of a block, wherever it was put."""
    at = gather_block.call(
        segments.ctypes.data, segments.strides[0], len(segments), out.ctypes.data, norms.ctypes.data, block
    )  # fmt: skip
    return np.ctypeslib.as_array((ctypes.c_float * BLOCK).from_address(at))


@pytest.mark.parametrize("spheres", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 63])
def test_a_block_is_the_sum_of_its_segments_in_sphere_order(spheres, rng, buffer):
    num_blocks = 3
    segments = rng.standard_normal((spheres, num_blocks * BLOCK), np.float32)
    # of very different sizes, so that any other order gives other bits
    segments *= 10.0 ** rng.integers(-6, 6, segments.shape).astype(np.float32)
    before = segments.copy()
    out, norms = buffer(BLOCK), np.full(num_blocks, np.nan)
    total = gather(segments, out, norms, 1)
    block = slice(BLOCK, 2 * BLOCK)
    expected = segments[0, block].copy()
    for segment in segments[1:, block]:
        expected += segment
    assert total.tobytes() == expected.tobytes()  # the very bits: a float32 sum in order
    at = segments[0, block] if spheres == 1 else out
    assert total.ctypes.data == at.ctypes.data
    # float64: 4,096 roundings of 1e-16
    assert math.isclose(norms[1], (expected.astype(float) ** 2).sum(), rel_tol=1e-12)
    assert np.isnan(norms[[0, 2]]).all() and (segments == before).all()


@pytest.mark.parametrize("spheres", [1, 2, 3, 4, 5, 12])
def test_the_sum_alone_has_the_bits_and_the_place_of_the_gathered_one(spheres, rng, buffer):
    segments = rng.standard_normal((spheres, 2 * BLOCK), np.float32)
    out, again, norms = buffer(BLOCK), buffer(BLOCK), np.full(2, np.nan)
    gathered = gather(segments, out, norms, 1)
    at = sum_block.call(segments.ctypes.data, segments.strides[0], spheres, again.ctypes.data, 1)
    assert at == (gathered.ctypes.data if spheres == 1 else again.ctypes.data)
    assert bytes((ctypes.c_char * (4 * BLOCK)).from_address(at)) == gathered.tobytes()
    assert np.isnan(out).all() == np.isnan(again).all() == (spheres == 1)


def test_gathering_again_changes_nothing(rng, buffer):
    segments = rng.standard_normal((5, BLOCK), np.float32)
    out, norms = buffer(BLOCK), np.full(1, np.nan)
    gather(segments, out, norms, 0)
    first = out.tobytes() + norms.tobytes()
    gather(segments, out, norms, 0)
    assert out.tobytes() + norms.tobytes() == first


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("sphere", [0, 2, 6])
def test_what_is_not_finite_reaches_the_norm(bad, sphere, rng, buffer):
    segments = rng.standard_normal((7, BLOCK), np.float32)
    segments[sphere, 4000] = bad
    gradient, norms = buffer(BLOCK), np.full(1, np.nan)
    gather(segments, gradient, norms, 0)
    assert not np.isfinite(gradient[4000]) and not np.isfinite(norms[0])
    assert not np.isfinite(global_norm.call(norms.ctypes.data, 1))


def test_a_gradient_whose_float32_square_overflows_has_a_finite_norm(buffer):
    segments, gradient, norms = np.full((1, BLOCK), 1e30, np.float32), buffer(BLOCK), np.full(1, np.nan)
    gather(segments, gradient, norms, 0)
    assert math.isclose(math.sqrt(norms[0]), 64e30, rel_tol=1e-6)  # float32's 1e30


def test_the_global_norm_is_the_root_of_the_sum_in_block_order(rng):
    squares = rng.random(1001)
    total = 0.0
    for square in squares:
        total += square
    assert global_norm.call(squares.ctypes.data, squares.size) == math.sqrt(total)


def test_clipping_equals_its_twin(rng):
    gradient = rng.standard_normal(100)
    norm = np.linalg.norm(gradient)
    for clip in (0.5, 1.0, norm * 0.999, norm * 1.001, 1e9):
        assert_close(gradient * clip_factor_of(norm, clip), naive.clip(gradient, clip)[0], 1e-15)
    assert clip_factor_of(norm, 0.0) == 1 and clip_factor_of(0.0, 1.0) == 1
