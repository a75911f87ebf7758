"""The dropout masks again, from whole Python numbers: (key, index) -> kept or not."""

from __future__ import annotations

import numpy as np

ALL_64, ALL_32 = 2**64 - 1, 2**32 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & ALL_64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & ALL_64
    return x ^ (x >> 31)


def combine(key, value):
    return mix((key * GOLDEN + mix((value + GOLDEN) & ALL_64)) & ALL_64)


def hash_of(key, index):
    x = (index ^ key) & ALL_32
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * factor & ALL_32
    x = (x ^ (x >> 16)) ^ (key >> 32)
    x = (x ^ (x >> 16)) * 0x7FEB352D & ALL_32
    return x ^ (x >> 15)


def mask(key, shape, threshold):
    """1 / (1 - rate) where kept, else 0; indices count through the array."""
    keep_scale = 1 / (1 - threshold / 2**32)
    kept = [hash_of(key, index) >= threshold for index in range(int(np.prod(shape)))]
    return np.array(kept, float).reshape(shape) * keep_scale


def mask_of_sequences(key, first_sequence, shape_BTC, threshold):
    """What dropout_sequences does with an array of ones."""
    b = shape_BTC[0]
    return np.stack([mask(combine(key, first_sequence + i), shape_BTC[1:], threshold) for i in range(b)])


def mask_of_attention(key, first_sequence, shape_BHTT, threshold):
    """What attention does to its probabilities."""
    b, h = shape_BHTT[:2]
    return np.stack(
        [
            np.stack([mask(combine(combine(key, first_sequence + i), j), shape_BHTT[2:], threshold) for j in range(h)])
            for i in range(b)
        ]
    )
