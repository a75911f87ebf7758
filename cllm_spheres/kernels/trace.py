"""Where the time of a step goes: a mark is left behind each kernel call and each phase.

A trace is int64: how many marks, how many there is room for, two words for the clock, then (kind, ns) for each mark.
The time of a kind is from the mark before it; a kind from SPHERE on says which sphere's shard begins. Address 0: no
trace is kept, a mark costs one comparison.
"""

from __future__ import annotations

import numpy as np
from numba import types

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels.arrays import integers
from cllm_spheres.kernels.sizes import HEADER_WORDS

KINDS = (
    "begin", "pack", "wait", "gather", "update", "read tokens", "embedding", "layer norm", "qkv", "attention",
    "attention projection", "feed-forward up", "gelu", "feed-forward down", "head", "linear dx", "linear dw",
    "linear backward", "gelu backward", "attention backward", "layer norm backward", "rearrange",
    "bias and residual backward", "embedding backward",
)  # fmt: skip
(
    BEGIN, PACK, WAIT, GATHER, UPDATE, READ, EMBED, NORM, QKV, ATTENTION,
    PROJECTION, UP, GELU, DOWN, HEAD, DX, DW,
    LINEAR_BACKWARD, GELU_BACKWARD, ATTENTION_BACKWARD, NORM_BACKWARD, REARRANGE,
    RESIDUAL, EMBED_BACKWARD,
) = range(len(KINDS))  # fmt: skip
SPHERE = 1 << 20
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
