"""Dropout whose mask is a function of where an activation stands, so that no mask is stored and none depends on
which process computes: an element is kept where a hash of (key, its index) is at least `threshold`.

key: uint64, of (seed, step, sequence in the batch, place in the model). threshold: uint32, rate * 2**32; 0 is off.
"""

from __future__ import annotations

import numpy as np

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.crystal.random import combine

u4 = np.uint32
_M1, _M2 = u4(0x7FEB352D), u4(0x846CA68B)


@kernel
def keeps(low, high, index, threshold):
    """Whether element `index` is kept. low, high: the halves of the key.

    Source of the mixing constants: Wellons, hash-prospector, lowbias32.
    """
    x = u4(index) ^ low
    x = u4(u4(x ^ u4(x >> u4(16))) * _M1)
    x = u4(u4(x ^ u4(x >> u4(15))) * _M2)
    x = u4(u4(x ^ u4(x >> u4(16))) ^ high)
    x = u4(u4(x ^ u4(x >> u4(16))) * _M1)
    x = u4(x ^ u4(x >> u4(15)))
    return x >= threshold


@kernel
def dropout(x_N, first_index, key, threshold, scale):
    """x = x * scale where kept, else 0, in place: the forward, and for gradients the backward too.

    first_index: the index of x[0]; scale: 1 / (1 - rate).
    """
    low, high = u4(key & np.uint64(0xFFFFFFFF)), u4(key >> np.uint64(32))
    for i in range(x_N.size):
        x_N[i] = x_N[i] * scale if keeps(low, high, first_index + i, threshold) else np.float32(0)


@kernel
def dropout_sequences(x_NC, length, key, first_sequence, threshold, scale):
    """Dropout in place over whole sequences, row n belonging to sequence first_sequence + n // length."""
    width = x_NC.shape[1]
    for n in range(x_NC.shape[0]):
        sequence, t = n // length, n % length
        dropout(x_NC[n], t * width, combine(key, first_sequence + sequence), threshold, scale)
