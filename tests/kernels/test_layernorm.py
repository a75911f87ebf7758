"""Layer normalisation."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_spheres.kernels.layernorm import layernorm_backward, layernorm_forward
from tests import naive
from tests.check import assert_close, assert_gradient

SIZES = [(1, 2), (1, 48), (7, 13), (65, 33), (3, 257)]  # N, C


def inputs(rng, n, c, bias):
    x = 3 + 2 * rng.standard_normal((n, c), np.float32)
    gain = rng.standard_normal(c, np.float32)
    return x, gain, rng.standard_normal(c if bias else 0, np.float32)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "c"), SIZES)
def test_forward_equals_its_twin(n, c, bias, rng, buffer):
    x, gain, shift = inputs(rng, n, c, bias)
    out, mean, rstd = buffer(n, c), buffer(n), buffer(n)
    layernorm_forward(x, gain, shift, out, mean, rstd)
    x, gain = x.astype(float), gain.astype(float)
    assert_close(out, naive.layernorm_forward(x, gain, shift if bias else 0.0))
    assert_close(mean, x.mean(1))
    assert_close(rstd, naive.normed(x)[1][:, 0])


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "c"), SIZES)
def test_backward_equals_its_twin(n, c, bias, accumulate, rng, buffer):
    x, gain, shift = inputs(rng, n, c, bias)
    dout = rng.standard_normal((n, c), np.float32)
    out, mean, rstd = buffer(n, c), buffer(n), buffer(n)
    layernorm_forward(x, gain, shift, out, mean, rstd)
    start = 5.0 if accumulate else np.nan
    dx, dgain, dbias = buffer(n, c, fill=2), buffer(c, fill=start), buffer(shift.size, fill=start)
    layernorm_backward(dout, x, gain, mean, rstd, dx, dgain, dbias, accumulate)
    expected = naive.layernorm_backward(dout.astype(float), x.astype(float), gain.astype(float))
    assert_close(dx, 2 + expected[0])
    assert_close(dgain, 5 * accumulate + expected[1])
    if bias:
        assert_close(dbias, 5 * accumulate + expected[2])


def test_epsilon_counts_where_the_variance_is_small(rng, buffer):
    x, gain, shift = (
        3e-3 * rng.standard_normal((5, 33), np.float32),
        np.ones(33, np.float32),
        np.empty(0, np.float32),
    )
    out, mean, rstd = buffer(5, 33), buffer(5), buffer(5)
    layernorm_forward(x, gain, shift, out, mean, rstd)
    assert_close(out, naive.layernorm_forward(x.astype(float), gain))


def test_a_constant_row_becomes_the_bias(buffer):
    x, gain, shift = np.full((2, 19), 7, np.float32), np.ones(19, np.float32), np.full(19, 0.5, np.float32)
    out, mean, rstd = buffer(2, 19), buffer(2), buffer(2)
    layernorm_forward(x, gain, shift, out, mean, rstd)
    assert_close(out, np.full((2, 19), 0.5), 1e-3)  # 1 / sqrt(eps) = 316 times the rounding of the mean


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_swallowed(bad, rng, buffer):
    x, gain, shift = inputs(rng, 3, 33, True)
    x[1, 32] = bad
    out, mean, rstd = buffer(3, 33, fill=0), buffer(3), buffer(3)
    layernorm_forward(x, gain, shift, out, mean, rstd)
    assert np.isnan(out[1]).all() and np.isfinite(out[[0, 2]]).all()
    dx, dgain, dbias = buffer(3, 33, fill=0), buffer(33), buffer(33)
    layernorm_backward(np.ones_like(x), x, gain, mean, rstd, dx, dgain, dbias, False)
    assert np.isnan(dx[1]).all() and np.isfinite(dx[[0, 2]]).all() and np.isnan(dgain).all()


def test_the_twins_gradients_are_finite_differences(rng):
    x, dout = rng.standard_normal((4, 7)), rng.standard_normal((4, 7))
    gain, bias = rng.standard_normal(7), rng.standard_normal(7)
    dx, dgain, dbias = naive.layernorm_backward(dout, x, gain)
    assert_gradient(lambda a: (naive.layernorm_forward(a, gain, bias) * dout).sum(), x, dx, rng)
    assert_gradient(lambda a: (naive.layernorm_forward(x, a, bias) * dout).sum(), gain, dgain, rng)
    assert_gradient(lambda a: (naive.layernorm_forward(x, gain, a) * dout).sum(), bias, dbias, rng)
