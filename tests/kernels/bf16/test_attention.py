"""Attention in tiles against float64 of the same bfloat16s.

Probabilities, the gradients of scores and the results are rounded to bfloat16: each product of them may be off by
BF16 of the sizes of its terms, element by element, and each result by BF16 of itself. The rest is float32.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests import naive
from tests.kernels import masks
from tests.kernels.bf16.twins import BF16, FLOAT32, form_of, matrix_of, padded, room, rounded, tiles

from cllm_spheres.kernels.bf16.attention import attention_backward, attention_forward  # isort: skip
from cllm_spheres.kernels.bf16.sizes import attention_bytes  # isort: skip

KEY, FIRST_SEQUENCE = 0x1234567890ABCDE, 11
THRESHOLD = 2**30  # a quarter is dropped
KEEP = float(np.float32(1 / (1 - THRESHOLD / 2**32)))
# B, T, H, D: nothing and everything is a multiple of 32; one and several blocks of queries; one and two of channels
SIZES = [(1, 1, 1, 1), (2, 31, 2, 5), (1, 32, 1, 32), (2, 40, 3, 20), (1, 70, 2, 33), (2, 128, 1, 64)]


class Attention:
    """Queries, keys, values and a gradient, float32[B, T, H, D], in forms whose T and D are padded to 32.

    Padding rows of qkv hold numbers too, as in the model; those of the gradient are zero, as in the model.
    """

    def __init__(self, rng, b, t, heads, d, threshold=0, size=1.0, first_sequence=FIRST_SEQUENCE):
        self.b, self.t, self.heads, self.d = b, t, heads, d
        self.tall, self.e = padded(t), padded(d)
        self.threshold, self.first_sequence = threshold, first_sequence
        self.parts = size * rng.standard_normal((3, b, self.tall, heads, d), np.float32)
        self.dout = np.zeros((b, self.tall, heads, d), np.float32)
        self.dout[:, :t] = rng.standard_normal((b, t, heads, d), np.float32)

    @property
    def mask(self):
        shape = self.b, self.heads, self.t, self.t
        if not self.threshold:
            return np.ones(shape)
        return masks.mask_of_attention(KEY, self.first_sequence, shape, self.threshold)

    def wide(self, parts):
        """[parts, B, T, H, D] -> [B T, parts H E]."""
        spread = np.zeros((len(parts), self.b, self.tall, self.heads, self.e), np.float32)
        spread[..., : self.d] = parts
        return spread.transpose(1, 2, 0, 3, 4).reshape(self.b * self.tall, -1)

    def narrow(self, form, parts):
        """A rows form -> [parts, B, H, T, D] of what is real; what is not must be zero."""
        wide = matrix_of("rows", form, self.b * self.tall, parts * self.heads * self.e)
        spread = wide.reshape(self.b, self.tall, parts, self.heads, self.e).transpose(2, 0, 3, 1, 4)
        assert not spread[..., self.d :].any(), "the padding of heads is not zero"
        return spread[..., : self.d]

    def run(self, lse):
        """out and dqkv as rows forms; lse is filled."""
        qkv = form_of("rows", self.wide(self.parts))
        scratch = np.full(attention_bytes(self.tall, self.e) // 4, np.nan, np.float32)
        address = scratch.ctypes.data
        sizes = self.b, self.tall, self.heads, self.d
        dropped = KEY, self.first_sequence, self.t, self.threshold
        columns = self.heads * self.e
        dout = form_of("rows", self.wide(self.dout[None]))
        with tiles(), room(self.b * self.tall * columns) as out, room(3 * self.b * self.tall * columns) as dqkv:
            attention_forward.call(qkv.ctypes.data, *sizes, *dropped, address, out.ctypes.data, lse.ctypes.data, KEEP)
            scratch[:] = np.nan
            attention_backward.call(
                dout.ctypes.data, qkv.ctypes.data, out.ctypes.data, lse.ctypes.data, *sizes, *dropped, address,
                dqkv.ctypes.data, KEEP,
            )  # fmt: skip
            return out.copy(), dqkv.copy()

    def forward_twin(self):
        """out[B, H, T, D], its bound, lse[B, H, T]."""
        q, k, v = (rounded(part[:, : self.t]).transpose(0, 2, 1, 3) for part in self.parts)
        scores = naive.attention_scores(q, k)
        p = naive.softmax(scores) * self.mask
        out = p @ v
        times = 2 if self.threshold else 1  # probabilities are rounded before dropout and after
        bound = times * BF16 * (p @ np.abs(v)) + BF16 * np.abs(out) + FLOAT32
        largest = scores.max(-1)
        return out, bound, largest + np.log(np.exp(scores - largest[..., None]).sum(-1))

    def backward_twin(self, out):
        """dqkv[3, B, H, T, D] and its bound; out: what the forward gave, which the backward starts from."""
        q, k, v = (rounded(part[:, : self.t]).transpose(0, 2, 1, 3) for part in self.parts)
        dout, kept = rounded(self.dout[:, : self.t]).transpose(0, 2, 1, 3), self.mask
        p = naive.softmax(naive.attention_scores(q, k))
        dp, delta = dout @ v.swapaxes(-1, -2) * kept, (dout * out).sum(-1, keepdims=True)
        ds = p * (dp - delta) / math.sqrt(self.d)
        ds_terms = BF16 * np.abs(ds) + FLOAT32 * p * (np.abs(dp) + np.abs(delta))
        times = 2 if self.threshold else 1
        dqkv = np.stack([ds @ k, ds.swapaxes(-1, -2) @ q, (p * kept).swapaxes(-1, -2) @ dout])
        terms = np.stack(
            [
                ds_terms @ np.abs(k),
                ds_terms.swapaxes(-1, -2) @ np.abs(q),
                times * BF16 * (p * kept).swapaxes(-1, -2) @ np.abs(dout),
            ]
        )
        return dqkv, terms + BF16 * np.abs(dqkv) + FLOAT32


@pytest.mark.parametrize("threshold", [0, THRESHOLD])
@pytest.mark.parametrize(("b", "t", "heads", "d"), SIZES)
def test_forward_and_backward_equal_their_twins(b, t, heads, d, threshold, rng, buffer):
    one = Attention(rng, b, t, heads, d, threshold)
    lse = buffer(b, heads, one.tall)
    out_form, dqkv_form = one.run(lse)
    out = one.narrow(out_form, 1)[0]
    twin, bound, lse_twin = one.forward_twin()
    assert (np.abs(out[:, :, :t] - twin) <= bound).all()
    assert np.abs(lse[:, :, :t] - lse_twin).max() <= FLOAT32 and np.isfinite(lse).all()
    dqkv = one.narrow(dqkv_form, 3)
    twin, bound = one.backward_twin(out[:, :, :t].astype(float))
    for part, name in enumerate(("dq", "dk", "dv")):
        difference = np.abs(dqkv[part][:, :, :t] - twin[part])
        assert (difference <= bound[part]).all(), f"{name} is off by {difference.max()}"
        assert not dqkv[part][:, :, t:].any(), f"{name} of padding is not zero"


def test_sharp_attention_equals_its_twin(rng, buffer):
    b, t, heads, d = 1, 70, 2, 8
    one = Attention(rng, b, t, heads, d, size=6.0)  # scores up to about 300
    lse = buffer(b, heads, one.tall)
    out_form, dqkv_form = one.run(lse)
    out = one.narrow(out_form, 1)[0][:, :, :t]
    twin, bound, lse_twin = one.forward_twin()
    # A score of 300 is known to 300 * 2**-24, so relatively are the probabilities: 2e-5, a few times over.
    assert (np.abs(out - twin) <= bound + 1e-4 * np.abs(twin).max()).all()
    assert np.abs(lse[:, :, :t] - lse_twin).max() <= 1e-4
    twin, bound = one.backward_twin(out.astype(float))
    assert (np.abs(one.narrow(dqkv_form, 3)[:, :, :, :t] - twin) <= bound + 1e-4 * np.abs(twin).max()).all()


@pytest.mark.parametrize("threshold", [0, THRESHOLD])
def test_no_position_sees_what_comes_after_it(threshold, rng, buffer):
    one = Attention(rng, 1, 100, 2, 8, threshold)
    lse = buffer(1, 2, 128)
    out = one.narrow(one.run(lse)[0], 1)[0]
    for changed in (1, 31, 32, 99):
        one.parts[:, :, changed:] = rng.standard_normal(one.parts[:, :, changed:].shape, np.float32)
        other = one.narrow(one.run(lse)[0], 1)[0]
        assert (other[:, :, :changed] == out[:, :, :changed]).all()
        assert (other[:, :, changed] != out[:, :, changed]).any()
        out = other


@pytest.mark.parametrize("threshold", [0, THRESHOLD])
def test_a_sequence_has_the_same_bits_wherever_in_a_batch_it_is_computed(threshold, rng, buffer):
    b, t, heads, d = 3, 70, 2, 8
    whole = Attention(rng, b, t, heads, d, threshold)
    out_form, dqkv_form = whole.run(buffer(b, heads, whole.tall))
    out, dqkv = whole.narrow(out_form, 1), whole.narrow(dqkv_form, 3)
    for i in range(b):
        one = Attention(rng, 1, t, heads, d, threshold, first_sequence=FIRST_SEQUENCE + i)
        one.parts, one.dout = whole.parts[:, i : i + 1], whole.dout[i : i + 1]
        one_out, one_dqkv = one.run(buffer(1, heads, one.tall))
        assert (one.narrow(one_out, 1)[:, 0] == out[:, i]).all()
        assert (one.narrow(one_dqkv, 3)[:, 0] == dqkv[:, i]).all()


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_swallowed_and_stays_in_its_head(bad, part, rng, buffer):
    one = Attention(rng, 1, 70, 2, 8)
    one.parts[["query", "key", "value"].index(part), 0, 40, 0, 3] = bad
    lse = buffer(1, 2, one.tall)
    out_form, dqkv_form = one.run(lse)
    wide = one.heads * one.e
    out = matrix_of("rows", out_form, one.tall, wide)
    dqkv = matrix_of("rows", dqkv_form, one.tall, 3 * wide).reshape(one.tall, 3, 2, one.e)
    assert not np.isfinite(out[40:70, : one.e]).all() and not np.isfinite(dqkv[:, :, 0]).all()
    assert np.isfinite(out[:, one.e :]).all() and np.isfinite(dqkv[:, :, 1]).all()


def test_a_nan_in_the_gradient_is_not_swallowed(rng, buffer):
    one = Attention(rng, 1, 70, 2, 8)
    one.dout[0, 40, 0, 3] = np.nan
    _, dqkv_form = one.run(buffer(1, 2, one.tall))
    dqkv = matrix_of("rows", dqkv_form, one.tall, 6 * one.e).reshape(one.tall, 3, 2, one.e)
    assert np.isnan(dqkv[40, 0, 0, :8]).all() and np.isfinite(dqkv[:, :, 1]).all()
