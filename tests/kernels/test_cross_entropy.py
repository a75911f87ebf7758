"""The tied head with softmax and cross-entropy."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_spheres.kernels.cross_entropy import count_correct, head_loss, head_loss_backward, softmax_cross_entropy
from cllm_spheres.kernels.sizes import product_floats
from tests import naive
from tests.check import assert_close, assert_gradient
from tests.kernels.soft import KINDS, Soft

SIZES = [
    (1, 1, 2, 1),
    (1, 33, 17, 4),
    (7, 13, 381, 3),
    (65, 48, 65, 64),
    (12, 16, 101, 12),
]  # N, C, V, R rows


def inputs(rng, n, c, v):
    x, wte = rng.standard_normal((n, c), np.float32), rng.standard_normal((v, c), np.float32)
    return x, wte, rng.integers(0, v, n, dtype=np.int32)


@pytest.mark.parametrize(("n", "c", "v", "rows"), SIZES)
def test_the_loss_equals_its_twin(n, c, v, rows, rng, buffer):
    x, wte, targets = inputs(rng, n, c, v)
    loss, correct = head_of(buffer, x, wte, targets, rows)
    expected = naive.head_forward(x.astype(float), wte.astype(float), targets)
    # Logits up to ~30 in float32 are known to ~1e-6 each.
    assert abs(loss - expected) < 1e-5 * n
    assert correct == ((x.astype(float) @ wte.T.astype(float)).argmax(1) == targets).sum()


def head_of(buffer, x, wte, targets, rows):
    """head_loss: the loss, and the targets that were the likeliest."""
    n, v = len(x), len(wte)
    correct = np.array([-1], np.int64)
    loss = head_loss(x, wte, targets, buffer(rows, v), buffer(product_floats(max(n, v))).ctypes.data, correct)
    return loss, correct[0]


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("n", "c", "v", "rows"), SIZES)
def test_backward_equals_its_twin(n, c, v, rows, accumulate, rng, buffer):
    x, wte, targets = inputs(rng, n, c, v)
    scale = np.float32(1 / 24)
    dx, dwte = buffer(n, c), buffer(v, c, fill=5 if accumulate else np.nan)
    scratch = buffer(product_floats(max(n, v)))
    loss, excess = head_loss_backward(
        x, wte, targets, scale, 0, buffer(rows, v), dx.ctypes.data, dwte.ctypes.data, accumulate, scratch.ctypes.data
    )
    assert (loss, excess) == (head_of(buffer, x, wte, targets, rows)[0], 0)
    expected = naive.head_backward(x.astype(float), wte.astype(float), targets)
    assert_close(dx, scale * expected[0])
    assert_close(dwte, 5 * accumulate + scale * expected[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "c", "v", "rows"), SIZES)
def test_with_soft_targets_losses_and_gradients_equal_their_twins(n, c, v, rows, kind, rng, buffer):
    x, wte, targets = inputs(rng, n, c, v)
    soft, scale = Soft(kind, v, rng), np.float32(1 / 24)
    dx, dwte = buffer(n, c), buffer(v, c)
    loss, excess = head_loss_backward(
        x, wte, targets, scale, soft.address, buffer(rows, v), dx.ctypes.data, dwte.ctypes.data, False,
        buffer(product_floats(max(n, v))).ctypes.data,
    )  # fmt: skip
    assert loss == head_of(buffer, x, wte, targets, rows)[0]  # to the bit, whatever the soft targets
    wide = x.astype(float), wte.astype(float), targets
    assert abs(loss + excess - naive.head_forward(*wide, *soft.twin)) < 1e-5 * n
    for found, expected in zip((dx, dwte), naive.head_backward(*wide, *soft.twin), strict=True):
        assert_close(found, scale * expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_soft_targets_add_is_a_share_of_the_difference_of_two_cross_entropies(kind, rng):
    logits, targets = 10 * rng.standard_normal((9, 50), np.float32), rng.integers(0, 50, 9, dtype=np.int32)
    soft = Soft(kind, 50, rng, alpha=1.0)
    loss, excess = softmax_cross_entropy(logits.copy(), targets, np.float32(1), soft.address)
    of_q = naive.cross_entropy_forward(logits.astype(float), targets, *soft.twin)
    assert abs(loss + excess - of_q) < 1e-4  # nine logarithms and logits up to 30 in float32
    for alpha in (0.0, 0.25):
        soft._card.view(np.float64)[0] = alpha
        again = softmax_cross_entropy(logits.copy(), targets, np.float32(1), soft.address)
        assert again[0] == loss and abs(again[1] - alpha * excess) <= 1e-15 * abs(excess)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_row_is_that_of_what_is_reported(kind, rng):
    """Finite differences of the kernel's own sum: logits in float32, so over a long step."""
    v = 40
    logits, targets = rng.standard_normal((3, v), np.float32), rng.integers(0, v, 3, dtype=np.int32)
    soft, gradient = Soft(kind, v, rng), logits.copy()
    softmax_cross_entropy(gradient, targets, np.float32(1), soft.address)
    for _ in range(5):
        direction = rng.standard_normal(logits.shape)
        sums = []
        for step in (0.01, -0.01):
            moved = (logits + step * direction).astype(np.float32)
            sums.append(sum(softmax_cross_entropy(moved, targets, np.float32(1), soft.address)))
        # the sums are known to ~1e-6 and divided by 0.02; the third derivative adds 1e-4 of their curvature
        assert abs((sums[0] - sums[1]) / 0.02 - (gradient * direction).sum()) < 1e-3


def test_a_share_of_nothing_is_plain_cross_entropy_to_the_bit(rng):
    logits, targets = rng.standard_normal((3, 33), np.float32), np.array([1, 2, 32], np.int32)
    plain, none = logits.copy(), logits.copy()
    loss = softmax_cross_entropy(plain, targets, np.float32(0.1), 0)
    for kind in KINDS:
        soft = Soft(kind, 33, rng, alpha=0.0)
        assert softmax_cross_entropy(none[...], targets, np.float32(0.1), soft.address) == loss
        assert none.tobytes() == plain.tobytes()
        none = logits.copy()


def test_a_neighbour_of_probability_zero_has_an_infinite_loss(rng):
    logits, targets = np.zeros((1, 33), np.float32), np.array([1], np.int32)
    soft = Soft("one neighbour", 33, rng)
    logits[0, soft.ids_VK[1, 0]] = -np.inf
    loss, excess = softmax_cross_entropy(logits, targets, np.float32(1), soft.address)
    assert np.isfinite(loss) and excess == np.inf and np.isfinite(logits).all()


@pytest.mark.parametrize("v", [1, 2, 15, 16, 17, 100])
def test_of_equal_logits_the_lowest_id_is_the_likeliest(v, rng):
    logits = rng.integers(0, 3, (200, v)).astype(np.float32)  # nearly every row has its largest several times
    targets = rng.integers(0, v, 200, dtype=np.int32)
    before = logits.copy()
    assert count_correct(logits, targets) == (logits.argmax(1) == targets).sum() > 0
    assert (logits == before).all()
    assert count_correct(np.full((3, v), np.nan, np.float32), targets[:3]) == 0


@pytest.mark.parametrize("v", [2, 15, 16, 17, 100])
def test_each_row_of_the_gradient_sums_to_zero(v, rng):
    logits, targets = 10 * rng.standard_normal((9, v), np.float32), rng.integers(0, v, 9, dtype=np.int32)
    expected = naive.cross_entropy_backward(logits.astype(float), targets)
    softmax_cross_entropy(logits, targets, np.float32(1), 0)
    assert_close(logits, expected)
    assert np.abs(logits.sum(1)).max() < 1e-6  # v roundings of numbers whose sizes sum to at most 2


def test_huge_logits_neither_overflow_nor_lose_the_loss():
    logits = np.array([[1e4, -1e4, 0], [-3e38, -3e38, -3e38]], np.float32)
    targets = np.array([1, 2], np.int32)
    loss, _ = softmax_cross_entropy(logits, targets, np.float32(1), 0)
    assert abs(loss - (2e4 + np.log(3))) < 1e-9
    assert_close(logits, np.array([[1, -1, 0], [1 / 3, 1 / 3, -2 / 3]]))


def test_the_loss_is_computed_in_float64():
    logits, targets = np.array([[8000, 0.01]], np.float32), np.array([1], np.int32)
    expected = 8000 - float(logits[0, 1])
    assert abs(softmax_cross_entropy(logits, targets, np.float32(1), 0)[0] - expected) < 1e-11


@pytest.mark.parametrize("place", [0, 17, 32])  # in the vectors and in the tail behind them
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_gives_nan(bad, place, rng):
    logits, targets = rng.standard_normal((3, 33), np.float32), np.array([1, 2, 3], np.int32)
    logits[1, place] = bad
    loss, _ = softmax_cross_entropy(logits, targets, np.float32(1), 0)
    assert np.isnan(loss) and np.isnan(logits[1]).all() and np.isfinite(logits[[0, 2]]).all()


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_row_of_nothing_but_nan_or_minus_infinity_gives_nan(bad):
    logits, targets = np.full((1, 33), bad, np.float32), np.array([1], np.int32)
    assert np.isnan(softmax_cross_entropy(logits, targets, np.float32(1), 0)[0])
    assert np.isnan(logits).all()


def test_a_target_of_probability_zero_has_an_infinite_loss():
    logits, targets = np.zeros((1, 33), np.float32), np.array([1], np.int32)
    logits[0, 1] = -np.inf
    assert softmax_cross_entropy(logits, targets, np.float32(1), 0)[0] == np.inf


def test_the_twins_gradients_are_finite_differences(rng):
    x, wte, targets = rng.standard_normal((5, 4)), rng.standard_normal((7, 4)), rng.integers(0, 7, 5)
    dx, dwte = naive.head_backward(x, wte, targets)
    assert_gradient(lambda a: naive.head_forward(a, wte, targets), x, dx, rng)
    assert_gradient(lambda a: naive.head_forward(x, a, targets), wte, dwte, rng)
    logits = rng.standard_normal((5, 7))
    gradient = naive.cross_entropy_backward(logits, targets)
    assert_gradient(lambda a: naive.cross_entropy_forward(a, targets), logits, gradient, rng)
    for kind in KINDS:
        soft = Soft(kind, 7, rng).twin
        dx, dwte = naive.head_backward(x, wte, targets, *soft)
        assert_gradient(lambda a: naive.head_forward(a, wte, targets, *soft), x, dx, rng)  # noqa: B023
        assert_gradient(lambda a: naive.head_forward(x, a, targets, *soft), wte, dwte, rng)  # noqa: B023
