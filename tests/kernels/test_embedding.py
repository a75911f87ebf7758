"""Token and position embeddings."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_spheres.kernels.embedding import embedding_backward, embedding_forward
from tests import naive
from tests.check import assert_close, assert_gradient

# B, T, V, rows of wpe, C
SIZES = [(1, 1, 1, 1, 1), (3, 5, 7, 9, 13), (2, 16, 33, 16, 48)]


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(("b", "t", "v", "positions", "c"), SIZES)
def test_forward_equals_its_twin(b, t, v, positions, c, padding, rng, buffer):
    ids = rng.integers(0, v, (b, t), dtype=np.int32)
    wte, wpe = rng.standard_normal((v, c), np.float32), rng.standard_normal((positions, c), np.float32)
    out = buffer(b * (t + padding), c)
    embedding_forward(ids.reshape(-1), wte, wpe, t, t + padding, out)
    rows = out.reshape(b, t + padding, c)
    assert (rows[:, :t] == naive.embedding_forward(ids, wte, wpe)).all()  # one float32 addition
    assert (rows[:, t:] == 0).all()


@pytest.mark.parametrize("accumulate", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize(("b", "t", "v", "positions", "c"), SIZES)
@pytest.mark.parametrize("padding", [0, 3])
def test_backward_equals_its_twin(b, t, v, positions, c, accumulate, padding, rng, buffer):
    ids = rng.integers(0, v, (b, t), dtype=np.int32)
    dout = rng.standard_normal((b, t + padding, c), np.float32)
    dwte, dwpe = (
        buffer(rows, c, fill=3 if adds else np.nan) for rows, adds in zip((v, positions), accumulate, strict=True)
    )
    embedding_backward(dout.reshape(-1, c), ids.reshape(-1), t, t + padding, dwte, dwpe, *accumulate)
    expected_dwte, expected_dwpe = naive.embedding_backward(dout[:, :t].astype(float), ids, v, positions)
    assert_close(dwte, 3 * accumulate[0] + expected_dwte)
    assert_close(dwpe, 3 * accumulate[1] + expected_dwpe)
    assert (dwpe[t:] == 3 * accumulate[1]).all()


def test_a_gradient_that_is_not_wanted_is_left_out(rng, buffer):
    ids, dout = np.array([1, 0, 1], np.int32), rng.standard_normal((3, 5), np.float32)
    both, alone, nothing = (buffer(2, 5), buffer(3, 5)), (buffer(2, 5), buffer(3, 5)), np.zeros((0, 5), np.float32)
    embedding_backward(dout, ids, 3, 3, *both, False, False)
    embedding_backward(dout, ids, 3, 3, alone[0], nothing, False, False)
    embedding_backward(dout, ids, 3, 3, nothing, alone[1], False, False)
    assert (both[0] == alone[0]).all() and (both[1] == alone[1]).all()


def test_the_twins_gradients_are_finite_differences(rng):
    ids = rng.integers(0, 7, (3, 5))
    wte, wpe, dout = rng.standard_normal((7, 4)), rng.standard_normal((6, 4)), rng.standard_normal((3, 5, 4))
    dwte, dwpe = naive.embedding_backward(dout, ids, 7, 6)
    assert_gradient(lambda w: (naive.embedding_forward(ids, w, wpe) * dout).sum(), wte, dwte, rng)
    assert_gradient(lambda w: (naive.embedding_forward(ids, wte, w) * dout).sum(), wpe, dwpe, rng)
