"""Causal attention: against its twin, with and without dropout."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_spheres.kernels.attention import attention_backward, attention_forward
from cllm_spheres.kernels.sizes import attention_floats
from tests import naive
from tests.check import FLOAT32, assert_close, assert_gradient
from tests.kernels import masks

# B, T, H, D: one position, one row of scores, a whole block of 64 queries, several and a part, odd widths
SIZES = [(1, 1, 1, 1), (3, 1, 2, 5), (2, 7, 3, 13), (1, 64, 2, 16), (2, 65, 2, 8), (1, 150, 2, 24)]
KEY, FIRST_SEQUENCE = 0x0123456789ABCDEF, 11


def attend(qkv, b, t, heads, buffer, threshold=0, first_sequence=FIRST_SEQUENCE):
    """out, lse and the arguments that forward and backward share."""
    out, lse = buffer(b * t, qkv.shape[1] // 3), buffer(b * heads * t)
    keep_scale = np.float32(1 / (1 - threshold / 2**32))
    common = (np.uint64(KEY), first_sequence, threshold, keep_scale, buffer(attention_floats(t)))
    attention_forward(qkv, t, heads, *common, out, lse)
    return out, lse, common


def mask(b, t, heads, threshold):
    if not threshold:
        return 1.0
    return masks.mask_of_attention(KEY, FIRST_SEQUENCE, (b, heads, t, t), threshold)


@pytest.mark.parametrize("threshold", [0, 2**30])
@pytest.mark.parametrize(("b", "t", "heads", "d"), SIZES)
def test_forward_and_backward_equal_their_twins(b, t, heads, d, threshold, rng, buffer):
    c = heads * d
    qkv, dout = rng.standard_normal((b * t, 3 * c), np.float32), rng.standard_normal((b * t, c), np.float32)
    out, lse, common = attend(qkv, b, t, heads, buffer, threshold)
    dqkv = buffer(b * t, 3 * c)
    attention_backward(dout, qkv, out, lse, t, heads, *common, dqkv)
    wide, wide_dout = qkv.reshape(b, t, -1).astype(float), dout.reshape(b, t, -1).astype(float)
    kept = mask(b, t, heads, threshold)
    assert_close(out, naive.attention_forward(wide, heads, kept).reshape(out.shape))
    assert np.abs(lse - naive.attention_log_sum_exp(wide, heads).reshape(-1)).max() < FLOAT32
    assert_close(dqkv, naive.attention_backward(wide_dout, wide, heads, kept).reshape(dqkv.shape), 2 * FLOAT32)


def test_sharp_attention_equals_its_twin(rng, buffer):
    b, t, heads, d = 1, 70, 2, 8
    qkv = 6 * rng.standard_normal((t, 3 * heads * d), np.float32)  # scores up to about 300
    dout = rng.standard_normal((t, heads * d), np.float32)
    out, lse, common = attend(qkv, b, t, heads, buffer)
    dqkv = buffer(*qkv.shape)
    attention_backward(dout, qkv, out, lse, t, heads, *common, dqkv)
    wide = qkv[None].astype(float)
    # A score of 300 is known to 300 * 2**-24, so relatively are the probabilities: 2e-5, a few times over.
    assert_close(out, naive.attention_forward(wide, heads)[0], 1e-4)
    assert_close(dqkv, naive.attention_backward(dout[None].astype(float), wide, heads)[0], 1e-4)


def test_no_position_sees_what_comes_after_it(rng, buffer):
    t, heads, d = 100, 2, 8
    qkv = rng.standard_normal((t, 3 * heads * d), np.float32)
    out, _, _ = attend(qkv, 1, t, heads, buffer)
    for changed in (1, 63, 64, 99):
        other = qkv.copy()
        other[changed:] = rng.standard_normal(other[changed:].shape, np.float32)
        assert (attend(other, 1, t, heads, buffer)[0][:changed] == out[:changed]).all()


@pytest.mark.parametrize("threshold", [0, 2**30])
def test_a_sequence_has_the_same_bits_wherever_in_a_batch_it_is_computed(threshold, rng, buffer):
    b, t, heads, d = 3, 70, 2, 8
    qkv = rng.standard_normal((b * t, 3 * heads * d), np.float32)
    dout = rng.standard_normal((b * t, heads * d), np.float32)
    out, lse, common = attend(qkv, b, t, heads, buffer, threshold)
    dqkv = buffer(*qkv.shape)
    attention_backward(dout, qkv, out, lse, t, heads, *common, dqkv)
    for i in range(b):
        rows = slice(i * t, (i + 1) * t)
        one = attend(qkv[rows], 1, t, heads, buffer, threshold, FIRST_SEQUENCE + i)
        one_dqkv = buffer(t, 3 * heads * d)
        attention_backward(dout[rows], qkv[rows], *one[:2], t, heads, *one[2], one_dqkv)
        assert (one[0] == out[rows]).all() and (one_dqkv == dqkv[rows]).all()


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_swallowed(bad, part, rng, buffer):
    t, heads, d, at = 70, 2, 8, 40
    c = heads * d
    qkv, dout = rng.standard_normal((t, 3 * c), np.float32), rng.standard_normal((t, c), np.float32)
    qkv[at, ("query", "key", "value").index(part) * c] = bad
    out, lse, common = attend(qkv, 1, t, heads, buffer)
    dqkv = buffer(t, 3 * c, fill=0)
    attention_backward(dout, qkv, out, lse, t, heads, *common, dqkv)
    assert not np.isfinite(out[at:, :d]).all() and np.isnan(dqkv).any()
    assert np.isfinite(out[:, d:]).all()  # the other head


def test_a_nan_in_the_gradient_is_not_swallowed(rng, buffer):
    t, heads, d = 70, 2, 8
    qkv, dout = rng.standard_normal((t, 48), np.float32), rng.standard_normal((t, 16), np.float32)
    dout[40, 3] = np.nan
    out, lse, common = attend(qkv, 1, t, heads, buffer)
    dqkv = buffer(t, 48, fill=0)
    attention_backward(dout, qkv, out, lse, t, heads, *common, dqkv)
    assert np.isnan(dqkv[40, :d]).all() and np.isfinite(dqkv[:, d : 2 * d]).all()


def test_the_twins_gradient_is_a_finite_difference(rng):
    qkv, dout = rng.standard_normal((2, 5, 3 * 6)), rng.standard_normal((2, 5, 6))
    for kept in (1.0, 2.0 * rng.integers(0, 2, (2, 3, 5, 5))):
        dqkv = naive.attention_backward(dout, qkv, 3, kept)
        assert_gradient(lambda a, m=kept: (naive.attention_forward(a, 3, m) * dout).sum(), qkv, dqkv, rng)
