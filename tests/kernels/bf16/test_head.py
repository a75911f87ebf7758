"""The tied head in chunks of the vocabulary, against float64 of the same bfloat16s."""

from __future__ import annotations

import numpy as np
import pytest

from tests import naive
from tests.check import assert_close
from tests.kernels.bf16.twins import BF16, form_of, padded, rounded, tiles
from tests.kernels.soft import KINDS, Soft

from cllm_spheres.kernels.bf16 import head  # isort: skip
from cllm_spheres.kernels.bf16.sizes import CHUNK  # isort: skip

# Rows (padded), width, vocabulary: part of a chunk, exactly one, one column more, and several with a rest.
SIZES = [(32, 1, 2), (32, 40, 33), (64, 33, 700), (32, 64, CHUNK), (64, 32, CHUNK + 1), (96, 45, 2 * CHUNK + 450)]


class Head:
    """Rows, token embeddings and targets with a few rows of padding, and the forms of them."""

    def __init__(self, rng, n, c, v, spread=1.0):
        self.n, self.c, self.v = n, c, v
        self.x = spread * rng.standard_normal((n, c), np.float32)
        self.wte = rng.standard_normal((v, c), np.float32)
        self.targets = rng.integers(0, v, n, dtype=np.int32)
        self.targets[[1, 5, *range(n - 7, n)]] = -1
        self.real = self.targets >= 0

    def expected(self, *soft):
        """The loss, dlogits, dx and dwte; nothing comes from padding rows. soft: alpha and q_VV of `naive.wanted`."""
        x, wte = rounded(self.x), rounded(self.wte)
        logits = x[self.real] @ wte.T
        dlogits = np.zeros((self.n, self.v))
        dlogits[self.real] = naive.cross_entropy_backward(logits, self.targets[self.real], *soft)
        loss = naive.cross_entropy_forward(logits, self.targets[self.real], *soft)
        return loss, dlogits, dlogits @ wte, dlogits.T @ x

    def loss(self):
        return self.loss_and_correct()[0]

    def loss_and_correct(self):
        stats, scratch = np.full(4 * self.n, np.nan, np.float32), np.full(32 * CHUNK, np.nan, np.float32)
        x, wte, correct = form_of("rows", self.x), form_of("flipped", self.wte), np.array([-1], np.int64)
        with tiles():
            loss = head.head_loss.call(
                x.ctypes.data, self.c, wte.ctypes.data, self.v, self.n, self.targets.ctypes.data, stats.ctypes.data,
                scratch.ctypes.data, correct.ctypes.data,
            )  # fmt: skip
        return loss, correct[0]

    def backward(self, dx, dwte, accumulate, scale, keep=False, soft=0):
        stats, scratch = np.full(5 * self.n + 2, np.nan, np.float32), np.full(32 * CHUNK, np.nan, np.float32)
        chunk = min(CHUNK, padded(self.v))
        kept = np.full((self.n, padded(self.v)), np.nan, np.float32)
        form, turned = np.full((2, self.n * chunk), 0xFFC1, np.uint16)
        x, x_pairs = form_of("rows", self.x), form_of("pairs", self.x)
        wte, wte_pairs = form_of("flipped", self.wte), form_of("pairs", self.wte)
        with tiles():
            loss = head.head_loss_backward.call(
                x.ctypes.data, x_pairs.ctypes.data, self.c, wte.ctypes.data, wte_pairs.ctypes.data, self.v, self.n,
                self.targets.ctypes.data, soft, stats.ctypes.data, scratch.ctypes.data,
                kept.ctypes.data if keep else 0, form.ctypes.data, turned.ctypes.data, dx.ctypes.data,
                dwte.ctypes.data, accumulate, scale,
            )  # fmt: skip
        self.excess = float(stats[-2:].view(np.float64)[0])
        return loss


@pytest.mark.parametrize(("n", "c", "v"), SIZES)
def test_the_loss_equals_its_twin(n, c, v, rng):
    one = Head(rng, n, c, v)
    # Logits up to ~30 in float32 are known to ~1e-6 each, and so is each row's logarithm.
    assert abs(one.loss() - one.expected()[0]) < 1e-5 * n


@pytest.mark.parametrize(("n", "c", "v"), SIZES)
def test_of_equal_logits_the_lowest_id_is_the_likeliest(n, c, v, rng):
    one = Head(rng, n, c, v)
    one.x, one.wte = rng.integers(-1, 2, (n, c)).astype(np.float32), rng.integers(-1, 2, (v, c)).astype(np.float32)
    likeliest = (one.x @ one.wte.T).argmax(1)  # small whole numbers: exact, and often equal
    one.targets = np.where(one.real & (rng.random(n) < 0.7), likeliest, one.targets).astype(np.int32)
    assert one.loss_and_correct()[1] == (likeliest == one.targets).sum() > 0


@pytest.mark.parametrize("accumulate", [0, 1])
@pytest.mark.parametrize(("n", "c", "v"), SIZES)
def test_backward_equals_its_twin_and_padding_rows_have_no_part_in_it(n, c, v, accumulate, rng, buffer):
    one = Head(rng, n, c, v)
    scale = 1 / 24
    dx, dwte = buffer(n, c), buffer(v, c, fill=1 if accumulate else np.nan)
    loss = one.backward(dx, dwte, accumulate, scale)
    assert loss == one.loss()
    _, dlogits, dx_twin, dwte_twin = one.expected()
    # Each dlogit is rounded to bfloat16: a product of them is off by at most BF16 of the sizes of its terms. What
    # is left is float32; FLOAT32 of the largest covers it.
    for found, twin, terms in (
        (dx, dx_twin, np.abs(dlogits) @ np.abs(rounded(one.wte))),
        (dwte - accumulate, dwte_twin, np.abs(dlogits).T @ np.abs(rounded(one.x))),
    ):
        bound = scale * (BF16 * terms + 1e-5 * np.abs(twin).max()) + accumulate * 2**-23
        assert (np.abs(found - scale * twin) <= bound).all()
    assert not dx[~one.real].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "c", "v"), SIZES)
def test_with_soft_targets_losses_and_gradients_equal_their_twins(n, c, v, kind, rng, buffer):
    one, soft, scale = Head(rng, n, c, v), Soft(kind, v, rng), 1 / 24
    dx, dwte = buffer(n, c), buffer(v, c)
    loss = one.backward(dx, dwte, 0, scale, soft=soft.address)
    assert loss == one.loss()  # to the bit, whatever the soft targets
    twin_loss, dlogits, dx_twin, dwte_twin = one.expected(*soft.twin)
    assert abs(loss + one.excess - twin_loss) < 1e-5 * n
    for found, twin, terms in (
        (dx, dx_twin, np.abs(dlogits) @ np.abs(rounded(one.wte))),
        (dwte, dwte_twin, np.abs(dlogits).T @ np.abs(rounded(one.x))),
    ):
        assert (np.abs(found - scale * twin) <= scale * (BF16 * terms + 1e-5 * np.abs(twin).max())).all()
    assert not dx[~one.real].any()
    kept_dx, kept_dwte = buffer(n, c), buffer(v, c)
    assert one.backward(kept_dx, kept_dwte, 0, scale, keep=True, soft=soft.address) == loss
    assert (kept_dx.tobytes(), kept_dwte.tobytes()) == (dx.tobytes(), dwte.tobytes())


@pytest.mark.parametrize(("n", "c", "v"), SIZES)
def test_keeping_the_logits_changes_no_bit(n, c, v, rng, buffer):
    one = Head(rng, n, c, v)
    found = []
    for keep in (False, True):
        dx, dwte = buffer(n, c), buffer(v, c)
        found.append((one.backward(dx, dwte, 0, 1 / 24, keep), dx.tobytes(), dwte.tobytes()))
    assert found[0] == found[1]


def test_a_head_of_nothing_but_padding_has_no_loss_and_no_gradient(rng, buffer):
    one = Head(rng, 32, 40, 100)
    one.targets[:] = -1
    dx, dwte = buffer(32, 40), buffer(100, 40)
    assert one.backward(dx, dwte, 0, 1.0) == 0 and not dx.any() and not dwte.any()


def test_huge_logits_neither_overflow_nor_lose_the_loss(rng, buffer):
    one = Head(rng, 32, 40, 2 * CHUNK + 3, spread=200)  # logits up to some thousands: all probability on one token
    loss, _, dx_twin, dwte_twin = one.expected()
    assert loss > 1e4
    assert_close(one.loss(), np.array(loss), 1e-6)  # float32 logits of thousands, ~1e-7 of themselves each
    dx, dwte = buffer(one.n, one.c), buffer(one.v, one.c)
    one.backward(dx, dwte, 0, 1.0)
    # a logit of some thousands in float32 is known to 1e-3, and so is its probability where two are near each other
    assert_close(dx, dx_twin, 4 * BF16)
    assert_close(dwte, dwte_twin, 4 * BF16)


@pytest.mark.parametrize("v", [100, 2 * CHUNK + 3])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_gives_nan(bad, v, rng, buffer):
    one = Head(rng, 32, 40, v)
    one.x[3, 7] = bad
    dx, dwte = buffer(32, 40, fill=0), buffer(v, 40, fill=0)
    assert np.isnan(one.loss())
    assert np.isnan(one.backward(dx, dwte, 0, 1.0))
    assert np.isnan(dx[3]).any() and np.isfinite(np.delete(dx, 3, 0)).all() and np.isnan(dwte).any()


@pytest.mark.parametrize("v", [100, 2 * CHUNK + 3])
def test_a_token_whose_embedding_is_not_finite_gives_nan(v, rng):
    for bad in (np.nan, np.inf):
        for token in (0, v // 2, v - 1):
            one = Head(rng, 32, 40, v)
            one.wte[token, 11] = bad
            assert np.isnan(one.loss()), (bad, token)
