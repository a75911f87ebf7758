"""The rows of soft targets: who is near a token, and what it gets."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_spheres.crystal.similarity import similarity
from cllm_spheres.crystal.soft_targets import crystal_rows, random_rows, softmax_rows


@pytest.mark.parametrize(("count", "neighbours"), [(2, 1), (30, 29), (257, 16)])
def test_rows_hold_the_most_similar_tokens_and_the_softmax_of_their_similarity(count, neighbours, rng):
    order_R = rng.permutation(count)
    ids_VK, weights_VK = crystal_rows(order_R, neighbours, 0.1, 0.7, 0.3)
    number_V = np.empty(count, int)
    number_V[order_R] = np.arange(1, count + 1)
    for token in range(count):
        similar_V = np.array([similarity(number_V[token], n, 0.7, 0.3) for n in number_V])
        similar_V[token] = -1
        assert token not in ids_VK[token] and len(set(ids_VK[token])) == neighbours
        assert np.array_equal(similar_V[ids_VK[token]], np.sort(similar_V)[::-1][:neighbours])
        expected = np.exp(similar_V[ids_VK[token]] / 0.1)
        assert np.allclose(weights_VK[token], expected / expected.sum(), rtol=1e-6)  # float32 of a float32 exp


def test_the_temperature_goes_from_the_nearest_alone_to_all_alike():
    similarities = np.array([[0.5, 0.4, 0.1]])
    assert np.array_equal(softmax_rows(similarities, 1e-4), [[1, 0, 0]])
    assert np.allclose(softmax_rows(similarities, 1e6), 1 / 3, rtol=1e-6)
    assert np.allclose(softmax_rows(similarities, 0.1).sum(), 1, rtol=1e-6)


@pytest.mark.parametrize(("count", "neighbours"), [(2, 1), (10, 9), (300, 16)])
def test_random_rows_are_distinct_others_and_a_function_of_the_seed(count, neighbours):
    ids_VK = random_rows(count, neighbours, 7)
    assert ids_VK.min() >= 0 and ids_VK.max() < count
    for token, row in enumerate(ids_VK):
        assert token not in row and len(set(row)) == neighbours
    assert np.array_equal(random_rows(count, neighbours, 7), ids_VK)


def test_random_rows_are_spread_over_all_tokens():
    ids_VK = random_rows(300, 16, 7)
    assert not np.array_equal(random_rows(300, 16, 8), ids_VK)
    # 4,800 draws over 300 tokens: 16 each, with a standard deviation of 4
    times_V = np.bincount(ids_VK.reshape(-1), minlength=300)
    assert times_V.min() > 0 and times_V.max() < 16 + 6 * 4
