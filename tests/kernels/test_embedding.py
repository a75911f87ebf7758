"""Token and position embeddings."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_spheres.kernels.embedding import embedding_backward, embedding_forward
from tests import naive
from tests.check import assert_close, assert_gradient

# B, T, V, rows of wpe, C
SIZES = [(1, 1, 1, 1, 1), (3, 5, 7, 9, 13), (2, 16, 33, 16, 48)]


@pytest.mark.parametrize(("b", "t", "v", "positions", "c"), SIZES)
def test_forward_equals_its_twin(b, t, v, positions, c, rng, buffer):
    ids = rng.integers(0, v, (b, t), dtype=np.int32)
    wte, wpe = rng.standard_normal((v, c), np.float32), rng.standard_normal((positions, c), np.float32)
    out = buffer(b * t, c)
    embedding_forward(ids.reshape(-1), wte, wpe, t, out)
    assert (out == naive.embedding_forward(ids, wte, wpe).reshape(b * t, c)).all()  # one float32 addition


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("b", "t", "v", "positions", "c"), SIZES)
def test_backward_equals_its_twin(b, t, v, positions, c, accumulate, rng, buffer):
    ids = rng.integers(0, v, (b, t), dtype=np.int32)
    dout = rng.standard_normal((b * t, c), np.float32)
    dwte, dwpe = buffer(v, c, fill=2), buffer(positions, c, fill=3 if accumulate else np.nan)
    embedding_backward(dout, ids.reshape(-1), t, dwte, dwpe, accumulate)
    expected_dwte, expected_dwpe = naive.embedding_backward(dout.reshape(b, t, c).astype(float), ids, v, positions)
    assert_close(dwte, 2 + expected_dwte)
    assert_close(dwpe, 3 * accumulate + expected_dwpe)
    assert (dwpe[t:] == 3 * accumulate).all()


def test_the_twins_gradients_are_finite_differences(rng):
    ids = rng.integers(0, 7, (3, 5))
    wte, wpe, dout = rng.standard_normal((7, 4)), rng.standard_normal((6, 4)), rng.standard_normal((3, 5, 4))
    dwte, dwpe = naive.embedding_backward(dout, ids, 7, 6)
    assert_gradient(lambda w: (naive.embedding_forward(ids, w, wpe) * dout).sum(), wte, dwte, rng)
    assert_gradient(lambda w: (naive.embedding_forward(ids, wte, w) * dout).sum(), wpe, dwpe, rng)
