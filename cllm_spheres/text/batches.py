"""(seed, step, corpus) -> the windows of that step's batch: a pure function, without memory.

An epoch cuts the corpus into num_tokens // block_size windows, from an offset that the epoch draws, and visits
each once, in an order that the epoch draws too. The corpus is a ring: its last window goes on at its beginning,
behind the end-of-text token. The sequences of all batches are numbered through: batch b of step n (from 0) is
sequence n * batch_size + b, which may already belong to the next epoch.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from cllm_spheres.crystal.jit import kernel, pointer
from cllm_spheres.crystal.random import PURPOSE_OFFSET, PURPOSE_ORDER, below, key_of, permuted


@kernel
def window_start(seed, sequence, num_tokens, block_size):
    """Where the window of a sequence (counted from the run's beginning) starts in the corpus."""
    num_windows = num_tokens // block_size
    epoch = sequence // num_windows
    order = permuted(key_of(seed, PURPOSE_ORDER, epoch), sequence % num_windows, num_windows)
    offset = below(key_of(seed, PURPOSE_OFFSET, epoch), 0, num_tokens)
    return (offset + order * block_size) % num_tokens


@kernel
def read_window(corpus_address, item_bytes, num_tokens, start, inputs_T, targets_T):
    """inputs_T, targets_T = the tokens from `start` on, and the same one later; the corpus is a ring.

    corpus_address: num_tokens little-endian uint16 or uint32, as item_bytes (2 or 4) says. Outputs are int32.
    """
    length = inputs_T.size
    at = start
    if item_bytes == 2:
        ids = carray(pointer(corpus_address), num_tokens, np.uint16)
        for t in range(length):
            inputs_T[t] = ids[at]
            at = at + 1 if at + 1 < num_tokens else 0
            targets_T[t] = ids[at]
    else:
        wide_ids = carray(pointer(corpus_address), num_tokens, np.uint32)
        for t in range(length):
            inputs_T[t] = np.int32(wide_ids[at])
            at = at + 1 if at + 1 < num_tokens else 0
            targets_T[t] = np.int32(wide_ids[at])


@kernel
def shard(batch_size, num_spheres, sphere):
    """The run of a batch's sequences that a sphere owns: (first, count). The first spheres get one more."""
    each, more = batch_size // num_spheres, batch_size % num_spheres
    return each * sphere + min(sphere, more), each + (1 if sphere < more else 0)
