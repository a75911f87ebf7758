"""The logits of one position and one uniform number -> the id of the next token. A pure function.

Temperature first, then top-k, top-p and min-p, each of what is left, as in Hugging Face's sampler; then the inverse of
the cumulative distribution over the ids in ascending order. V vocabulary, K candidates.
"""

from __future__ import annotations

import numpy as np
from numba import carray, types

from cllm_spheres.crystal.functions.bits import bits_of_float
from cllm_spheres.crystal.jit import entry, kernel, pointer, reduction
from cllm_spheres.kernels.arrays import exp_of_difference, f4, floats

_i4, _i8, _d8 = np.int32, types.int64, types.float64
_SIGN_OFF, _INFINITE = np.int32(0x7FFFFFFF), np.int32(0x7F800000)
_STEEPEST = 1e30  # of 1 / temperature: differences times it stay floats, or become -inf
SCRATCH_WORDS = 3  # of 4 bytes, for each token of the vocabulary


@reduction
def _above(keys_K, least):
    """How many keys are at least `least`."""
    count = 0
    for i in range(keys_K.size):
        count += 1 if keys_K[i] >= least else 0
    return count


@reduction
def _weight_above(keys_K, weights_K, least):
    """The weight of the keys that are at least `least`."""
    total = 0.0
    for i in range(keys_K.size):
        total += np.float64(weights_K[i]) if keys_K[i] >= least else 0.0
    return total


@kernel
def _keep(keys_K, weights_K, ids_K, least, equal_ones):
    """Move the candidates above `least` and the first `equal_ones` equal to it to the front; their number."""
    kept = 0
    for i in range(keys_K.size):
        if keys_K[i] > least or (keys_K[i] == least and equal_ones > 0):
            equal_ones -= 1 if keys_K[i] == least else 0
            keys_K[kept], weights_K[kept], ids_K[kept] = keys_K[i], weights_K[i], ids_K[i]
            kept += 1
    return kept


@kernel
def _keep_largest(keys_K, weights_K, ids_K, count):
    """Keep `count` candidates with the largest logits, of equal ones those with the lowest ids."""
    least = np.int64(-(2**31))
    for bit in range(31, -1, -1):  # the largest key that `count` others reach
        if _above(keys_K, _i4(least + (1 << bit))) >= count and least + (1 << bit) < 2**31:
            least += 1 << bit
    equal_ones = count - (_above(keys_K, _i4(least + 1)) if least < 2**31 - 1 else 0)
    return _keep(keys_K, weights_K, ids_K, _i4(least), equal_ones)


@kernel
def _keep_probable(keys_K, weights_K, ids_K, share):
    """Keep the fewest of the likeliest candidates whose weight reaches a share of the whole."""
    wanted = share * _weight_above(keys_K, weights_K, _i4(-(2**31)))
    least = np.int64(-(2**31))
    for bit in range(31, -1, -1):
        if least + (1 << bit) < 2**31 and _weight_above(keys_K, weights_K, _i4(least + (1 << bit))) >= wanted:
            least += 1 << bit
    reached, equal_ones = _weight_above(keys_K, weights_K, _i4(least + 1)) if least < 2**31 - 1 else 0.0, 0
    for i in range(keys_K.size):
        if keys_K[i] == least and (equal_ones == 0 or reached < wanted):
            reached += weights_K[i]
            equal_ones += 1
    return _keep(keys_K, weights_K, ids_K, _i4(least), equal_ones)


@entry(_i8(_i8, _i8, _d8, _i8, _d8, _d8, _d8, _i8))
def choose_token(logits, vocab_size, temperature, top_k, top_p, min_p, uniform, scratch):
    """The id of the next token, or -1 where a logit is NaN or +inf, or all are -inf.

    logits: address of float32[V], not changed; an id whose logit is -inf is never chosen. Temperature 0: the largest,
    the lowest id of equal ones. top_k: 0 is off; top_p: 1 is off; min_p: 0 is off, else the smallest share of the
    likeliest token's probability. uniform: in [0, 1). scratch: SCRATCH_WORDS * V words of 4 bytes.
    """
    logits_V = floats(logits, vocab_size)
    best = 0
    for i in range(vocab_size):
        bits = bits_of_float(logits_V[i])
        if (bits & _SIGN_OFF) > _INFINITE or bits == _INFINITE:
            return -1
        if logits_V[i] > logits_V[best]:
            best = i
    if bits_of_float(logits_V[best]) & _SIGN_OFF == _INFINITE:
        return -1
    if temperature == 0.0:
        return best
    keys = carray(pointer(scratch), vocab_size, np.int32)
    weights = floats(scratch + 4 * vocab_size, vocab_size)
    ids = carray(pointer(scratch + 8 * vocab_size), vocab_size, np.int32)
    for i in range(vocab_size):
        bits = bits_of_float(logits_V[i] + f4(0))  # -0 is 0
        keys[i] = bits if bits >= 0 else bits ^ _SIGN_OFF  # ordered as the logits are
        weights[i] = logits_V[i]
        ids[i] = i
    exp_of_difference(weights, logits_V[best], f4(min(1.0 / temperature, _STEEPEST)), vocab_size)
    count = vocab_size
    if 0 < top_k < count:
        count = _keep_largest(keys, weights, ids, top_k)
    if top_p < 1.0:
        count = _keep_probable(keys[:count], weights[:count], ids[:count], top_p)
    whole = 0.0
    for i in range(count):
        weights[i] = weights[i] if weights[i] >= min_p else f4(0)
        whole += weights[i]
    wanted, reached, last = uniform * whole, 0.0, best
    for i in range(count):
        reached += weights[i]
        if weights[i] > f4(0):
            last = ids[i]
            if reached > wanted:
                break
    return last
