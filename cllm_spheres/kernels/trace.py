"""Where the time of a shard goes: a page of kernel calls leaves a mark behind each of them.

A trace is int64: how many marks, how many there is room for, two words for the clock, then (kind, ns) for each mark.
The time of a kind is from the mark before it. Address 0: no trace is kept, a mark costs one comparison.
"""

from __future__ import annotations

import numpy as np
from numba import types

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels.arrays import integers

KINDS = (
    "begin", "tokens and embedding", "layer norm", "qkv", "attention", "projection", "feed-forward up",
    "feed-forward down", "head", "head weights", "attention backward", "linear dx", "linear dw", "gelu backward",
    "layer norm backward", "turning", "biases and residual", "embedding backward",
)  # fmt: skip
(
    BEGIN, EMBED, NORM, QKV, ATTENTION, PROJECTION, UP, DOWN, HEAD, HEAD_WEIGHTS, ATTENTION_BACKWARD, DX, DW,
    GELU_BACKWARD, NORM_BACKWARD, TURN, RESIDUAL, EMBED_BACKWARD,
) = range(len(KINDS))  # fmt: skip
HEADER_WORDS = 4
MONOTONIC = 1
_i8 = types.int64
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, _i8))


@kernel
def clock_ns(clock, scratch):
    """A clock (0 real time, 1 monotonic) in nanoseconds; scratch: the address of int64[2]."""
    _clock_gettime(np.int32(clock), scratch)
    t = integers(scratch, 2)
    return t[0] * 1000000000 + t[1]


@kernel
def mark(trace, kind):
    """What has just been done is of this kind; nothing is written where the trace is full or 0."""
    if trace == 0:
        return
    words = integers(trace, HEADER_WORDS)
    count = words[0]
    if count < words[1]:
        event = integers(trace + 8 * (HEADER_WORDS + 2 * count), 2)
        event[0] = kind
        event[1] = clock_ns(MONOTONIC, trace + 16)
        words[0] = count + 1
