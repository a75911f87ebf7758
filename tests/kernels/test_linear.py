"""The linear layer and the matrix product under it."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_spheres.kernels.linear import linear_backward, linear_forward, linear_residual_forward
from cllm_spheres.kernels.sizes import product_floats
from tests import naive
from tests.check import assert_close, assert_gradient

SIZES = [(1, 1, 1), (1, 48, 17), (7, 13, 33), (65, 33, 129)]  # M, I, O


def inputs(rng, m, i, o, bias):
    x, w = rng.standard_normal((m, i), np.float32), rng.standard_normal((i, o), np.float32)
    return x, w, rng.standard_normal(o if bias else 0, np.float32)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "i", "o"), SIZES)
def test_forward_equals_its_twin(m, i, o, bias, rng, buffer):
    x, w, b = inputs(rng, m, i, o, bias)
    residual, out, out_residual = rng.standard_normal((m, o), np.float32), buffer(m, o), buffer(m, o)
    products = buffer(product_floats(m)).ctypes.data
    linear_forward(x, w, b, out, products)
    linear_residual_forward(x, w, b, residual, out_residual, products)
    expected = naive.linear_forward(x.astype(float), w.astype(float), b if bias else 0.0)
    assert_close(out, expected)
    assert_close(out_residual, residual + expected)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "i", "o"), SIZES)
def test_backward_equals_its_twin(m, i, o, bias, accumulate, rng, buffer):
    x, w, b = inputs(rng, m, i, o, bias)
    dout = rng.standard_normal((m, o), np.float32)
    start = 5.0 if accumulate else np.nan
    dx, dw, db = buffer(m, i), buffer(i, o, fill=start), buffer(b.size, fill=start)
    linear_backward(dout, x, w, dx, dw, db, accumulate, buffer(product_floats(max(m, i))).ctypes.data)
    expected = naive.linear_backward(dout.astype(float), x.astype(float), w.astype(float))
    assert_close(dx, expected[0])
    assert_close(dw, 5 * accumulate + expected[1])
    if bias:
        assert_close(db, 5 * accumulate + expected[2])


def test_the_same_product_has_the_same_bits_at_any_alignment(rng, buffer):
    m, i, o = 65, 33, 129
    x, w, _ = inputs(rng, m, i, o, False)
    results = set()
    for shift in range(9):
        moved = np.empty(x.size + 8, np.float32)[shift:][: x.size].reshape(m, i)
        moved[...] = x
        out = buffer(m * o + shift)[shift:].reshape(m, o)
        linear_forward(moved, w, np.empty(0, np.float32), out, buffer(product_floats(m)).ctypes.data)
        results.add(out.tobytes())
    assert len(results) == 1


def test_the_twins_gradients_are_finite_differences(rng):
    x, w, b, dout = (rng.standard_normal(dims) for dims in ((2, 3, 5), (5, 4), (4,), (2, 3, 4)))
    dx, dw, db = naive.linear_backward(dout, x, w)
    assert_gradient(lambda a: (naive.linear_forward(a, w, b) * dout).sum(), x, dx, rng)
    assert_gradient(lambda a: (naive.linear_forward(x, a, b) * dout).sum(), w, dw, rng)
    assert_gradient(lambda a: (naive.linear_forward(x, w, a) * dout).sum(), b, db, rng)
