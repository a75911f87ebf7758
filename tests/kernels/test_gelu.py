"""GELU in its tanh form."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_spheres.kernels.gelu import gelu_backward, gelu_forward
from tests import naive
from tests.check import assert_gradient

# Absolute, for |x| up to about 10 and |dout| to about 4: a few roundings of 6e-8 of them. Near x = -0.75 the
# terms of the derivative cancel, so nothing relative can be promised.
TOLERANCE = 4e-6


@pytest.mark.parametrize("n", [1, 15, 16, 17, 1000])
def test_forward_and_backward_equal_their_twins(n, rng, buffer):
    x, out = 3 * rng.standard_normal(n, np.float32), buffer(n)
    gelu_forward(x, out)
    assert np.abs(out - naive.gelu_forward(x.astype(float))).max() < TOLERANCE
    dout = rng.standard_normal(n, np.float32)
    dx = buffer(n)
    dx[:] = dout
    gelu_backward(x, dx)
    assert np.abs(dx - naive.gelu_backward(dout.astype(float), x.astype(float))).max() < TOLERANCE


def test_far_from_zero_it_is_the_identity_or_nothing(buffer):
    x = np.array([20, 1e4, 1e12, -20, -1e4, -1e12, 0], np.float32)
    out, dx = buffer(x.size), buffer(x.size, fill=1)
    gelu_forward(x, out)
    gelu_backward(x, dx)
    assert (out == np.where(x > 0, x, 0)).all()
    assert (dx == [1, 1, 1, 0, 0, 0, 0.5]).all()


@pytest.mark.parametrize("place", [0, 16, 32])  # in the vectors and in the tail behind them
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_swallowed(bad, place, buffer):
    x, out, dx = np.ones(33, np.float32), buffer(33), buffer(33, fill=1)
    x[place] = bad
    gelu_forward(x, out)
    gelu_backward(x, dx)
    assert not np.isfinite(out[place]) and np.isnan(dx[place])
    assert np.isfinite(np.delete(out, place)).all() and np.isfinite(np.delete(dx, place)).all()
    x[place], dx[:] = 1, 1
    dx[place] = bad
    gelu_backward(x, dx)
    assert not np.isfinite(dx[place])


def test_the_twins_gradient_is_a_finite_difference(rng):
    x, dout = 2 * rng.standard_normal(50), rng.standard_normal(50)
    assert_gradient(lambda a: (naive.gelu_forward(a) * dout).sum(), x, naive.gelu_backward(dout, x), rng)
