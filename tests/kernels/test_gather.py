"""Segments -> gradient, its norm, and the factor of the clip."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels.gather import clip_factor, gather_block, global_norm
from cllm_spheres.kernels.sizes import BLOCK
from tests import naive
from tests.check import assert_close


@kernel
def clip_factor_of(norm, clip):
    return clip_factor(norm, clip)


def gather(segments, gradient, norms, block):
    gather_block.call(
        segments.ctypes.data,
        segments.strides[0],
        len(segments),
        gradient.ctypes.data,
        norms.ctypes.data,
        block,
    )


@pytest.mark.parametrize("spheres", [1, 2, 4, 5, 6, 7, 8, 9, 63])
def test_a_block_is_the_sum_of_its_segments_in_sphere_order(spheres, rng, buffer):
    num_blocks = 3
    segments = rng.standard_normal((spheres, num_blocks * BLOCK), np.float32)
    before = segments.copy()
    gradient, norms = buffer(num_blocks * BLOCK), np.full(num_blocks, np.nan)
    gather(segments, gradient, norms, 1)
    expected = segments[0].copy()
    for segment in segments[1:]:
        expected += segment
    block = slice(BLOCK, 2 * BLOCK)
    assert (gradient[block] == expected[block]).all()  # the very bits: a float32 sum in order
    assert np.isnan(gradient[:BLOCK]).all() and np.isnan(gradient[2 * BLOCK :]).all()
    # float64: 4,096 roundings of 1e-16
    assert math.isclose(norms[1], (expected[block].astype(float) ** 2).sum(), rel_tol=1e-12)
    assert np.isnan(norms[[0, 2]]).all() and (segments == before).all()


def test_gathering_again_changes_nothing(rng, buffer):
    segments = rng.standard_normal((5, BLOCK), np.float32)
    gradient, norms = buffer(BLOCK), np.full(1, np.nan)
    gather(segments, gradient, norms, 0)
    first = gradient.tobytes() + norms.tobytes()
    gather(segments, gradient, norms, 0)
    assert gradient.tobytes() + norms.tobytes() == first


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
