"""Tokens ordered by frequency -> the neighbours that share each token's target, and their weights.

R ranks (0 is the most frequent token), V token ids, K neighbours. The number of a token in the crystal is its rank + 1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cllm_spheres.crystal.functions.single import exp
from cllm_spheres.crystal.jit import kernel
from cllm_spheres.crystal.random import PURPOSE_NEIGHBOURS, combine, key_of, permuted
from cllm_spheres.crystal.similarity import nearest


def crystal_rows(
    order_R: np.ndarray, neighbours: int, temperature: float, gcd_weight: float, ulam_weight: float,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The most similar others of every token, int32 [V, K], the most similar first; their weights, float32 [V, K].

    A weight is the softmax of similarity / temperature over a row. order_R: the token ids by falling frequency.
    neighbours: at most V - 1.
    """
    numbers_RK, similarities_RK = nearest(len(order_R), neighbours, gcd_weight, ulam_weight, progress)
    ids_VK, weights_VK = np.empty(numbers_RK.shape, np.int32), np.empty(numbers_RK.shape, np.float32)
    ids_VK[order_R] = order_R[numbers_RK - 1]
    weights_VK[order_R] = softmax_rows(similarities_RK, temperature)
    return ids_VK, weights_VK


def random_rows(vocab_size: int, neighbours: int, seed: int) -> np.ndarray:
    """For every token distinct others drawn by lot, int32 [V, K]."""
    ids_VK = np.empty((vocab_size, neighbours), np.int32)
    _draw(np.uint64(key_of(seed, PURPOSE_NEIGHBOURS, 0)), ids_VK)
    return ids_VK


def softmax_rows(similarities_VK: np.ndarray, temperature: float) -> np.ndarray:
    """float32 rows that sum to 1: exp(similarity / temperature) divided by their sum."""
    weights_VK = np.empty(similarities_VK.shape, np.float32)
    _softmax(similarities_VK, temperature, weights_VK)
    return weights_VK


@kernel
def _softmax(similarities_VK, temperature, weights_VK):
    for v in range(similarities_VK.shape[0]):
        row, out = similarities_VK[v], weights_VK[v]
        largest, total = row.max(), 0.0
        for k in range(row.size):
            out[k] = exp(np.float32((row[k] - largest) / temperature))
            total += np.float64(out[k])
        for k in range(row.size):
            out[k] = np.float32(np.float64(out[k]) / total)


@kernel
def _draw(key, ids_VK):
    count, neighbours = ids_VK.shape
    for v in range(count):
        of_token = combine(key, v)
        for k in range(neighbours):
            other = permuted(of_token, k, count - 1)
            ids_VK[v, k] = other + 1 if other >= v else other
