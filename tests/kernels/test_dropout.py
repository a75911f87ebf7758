"""Dropout by a hash of (key, index)."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_spheres.crystal.random import combine
from cllm_spheres.kernels.dropout import dropout, dropout_sequences
from tests.kernels import masks

KEY = np.uint64(0x0123456789ABCDEF)


def dropped(n, key=KEY, first_index=0, rate=0.25):
    x = np.ones(n, np.float32)
    dropout(x, first_index, key, np.uint32(rate * 2**32), np.float32(1 / (1 - rate)))
    return x


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.75])
def test_it_keeps_the_right_share_and_scales_it(rate):
    n = 200_000
    x = dropped(n, rate=rate)
    assert set(np.unique(x)) == {np.float32(0), np.float32(1 / (1 - rate))}
    # five standard deviations of a binomial distribution
    assert abs((x > 0).mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / n)


def test_the_mask_equals_its_twin():
    assert np.allclose(dropped(1000), masks.mask(int(KEY), (1000,), 2**30), rtol=1e-7)


def test_the_mask_is_a_function_of_key_and_index_only():
    whole = dropped(1000)
    for first, last in ((0, 1), (1, 18), (333, 1000)):
        assert (dropped(last - first, first_index=first) == whole[first:last]).all()


def test_forward_and_backward_have_the_same_mask(rng):
    x = rng.standard_normal((6, 13), np.float32)
    forward, backward = x.copy(), np.ones_like(x)
    for array in (forward, backward):
        dropout_sequences(array, 3, KEY, 5, np.uint32(2**31), np.float32(2))
    assert (forward == x * backward).all() and 0 < (backward == 0).sum() < x.size


def test_a_sequence_has_the_same_mask_wherever_in_a_batch_it_is_computed():
    together = np.ones((4 * 3, 13), np.float32)
    dropout_sequences(together, 3, KEY, 5, np.uint32(2**31), np.float32(2))
    for sequence in range(4):
        alone = np.ones((3, 13), np.float32)
        dropout_sequences(alone, 3, KEY, 5 + sequence, np.uint32(2**31), np.float32(2))
        assert (alone == together[3 * sequence : 3 * sequence + 3]).all()
    expected = masks.mask_of_sequences(int(KEY), 5, (4, 3, 13), 2**31)
    assert (together.reshape(4, 3, 13) == expected).all()


def test_other_keys_and_neighbouring_indices_are_independent():
    n = 100_000
    rows = [dropped(n, np.uint64(combine(KEY, i)), rate=0.5) > 0 for i in range(4)]
    rows += [np.roll(rows[0], 1), np.roll(rows[0], 16)]
    correlation = np.corrcoef(np.array(rows, float)) - np.eye(len(rows))
    assert np.abs(correlation).max() < 5 / np.sqrt(n)  # five standard deviations


def test_halves_of_the_key_both_count():
    high, low = KEY ^ np.uint64(1 << 40), KEY ^ np.uint64(1)
    assert (dropped(1000) != dropped(1000, high)).any() and (dropped(1000) != dropped(1000, low)).any()


def test_threshold_zero_keeps_everything():
    assert (dropped(1000, rate=0) == 1).all()
