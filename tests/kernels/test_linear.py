"""The linear layer and the matrix product under it."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_spheres.kernels.linear import linear_backward, linear_forward
from cllm_spheres.kernels.sizes import product_floats
from tests import naive
from tests.check import assert_close, assert_gradient

SIZES = [(1, 1, 1), (1, 48, 17), (7, 13, 33), (65, 33, 129)]  # M, I, O


def inputs(rng, m, i, o):
    x, w = rng.standard_normal((m, i), np.float32), rng.standard_normal((i, o), np.float32)
    return x, w, rng.standard_normal(o, np.float32)


def at(array, wanted=True):
    return array.ctypes.data if wanted else 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "i", "o"), SIZES)
def test_forward_equals_its_twin(m, i, o, bias, rng, buffer):
    x, w, b = inputs(rng, m, i, o)
    residual, out, out_residual = rng.standard_normal((m, o), np.float32), buffer(m, o), buffer(m, o)
    products = at(buffer(product_floats(m)))
    linear_forward(m, i, o, at(x), at(w), at(b, bias), 0, at(out), products)
    linear_forward(m, i, o, at(x), at(w), at(b, bias), at(residual), at(out_residual), products)
    expected = naive.linear_forward(x.astype(float), w.astype(float), b if bias else 0.0)
    assert_close(out, expected)
    assert_close(out_residual, residual + expected)


@pytest.mark.parametrize("wanted", [(1, 1, 1), (1, 1, 0), (0, 1, 1), (1, 0, 0)])
@pytest.mark.parametrize("accumulate", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize(("m", "i", "o"), SIZES)
def test_backward_equals_its_twin_and_leaves_out_what_is_not_wanted(m, i, o, wanted, accumulate, rng, buffer):
    x, w, _ = inputs(rng, m, i, o)
    dout = rng.standard_normal((m, o), np.float32)
    starts = [5.0 if adds else np.nan for adds in accumulate]
    dx, dw, db = buffer(m, i), buffer(i, o, fill=starts[0]), buffer(o, fill=starts[1])
    before = [array.copy() for array in (dx, dw, db)]
    linear_backward(
        m, i, o, at(dout), at(x), at(w), at(dx, wanted[0]), at(dw, wanted[1]), accumulate[0], at(db, wanted[2]),
        accumulate[1], at(buffer(product_floats(max(m, i)))),
    )  # fmt: skip
    expected = naive.linear_backward(dout.astype(float), x.astype(float), w.astype(float))
    for found, old, is_wanted, twin, adds in zip(
        (dx, dw, db), before, wanted, expected, (False, *accumulate), strict=True
    ):
        if is_wanted:
            assert_close(found, 5 * adds + twin)
        else:
            assert found.tobytes() == old.tobytes()


def test_the_same_product_has_the_same_bits_at_any_alignment(rng, buffer):
    m, i, o = 65, 33, 129
    x, w, _ = inputs(rng, m, i, o)
    results = set()
    for shift in range(9):
        moved = np.empty(x.size + 8, np.float32)[shift:][: x.size].reshape(m, i)
        moved[...] = x
        out = buffer(m * o + shift)[shift:].reshape(m, o)
        linear_forward(m, i, o, at(moved), at(w), 0, 0, at(out), at(buffer(product_floats(m))))
        results.add(out.tobytes())
    assert len(results) == 1


def test_the_twins_gradients_are_finite_differences(rng):
    x, w, b, dout = (rng.standard_normal(dims) for dims in ((2, 3, 5), (5, 4), (4,), (2, 3, 4)))
    dx, dw, db = naive.linear_backward(dout, x, w)
    assert_gradient(lambda a: (naive.linear_forward(a, w, b) * dout).sum(), x, dx, rng)
    assert_gradient(lambda a: (naive.linear_forward(x, a, b) * dout).sum(), w, dw, rng)
    assert_gradient(lambda a: (naive.linear_forward(x, w, a) * dout).sum(), b, db, rng)
