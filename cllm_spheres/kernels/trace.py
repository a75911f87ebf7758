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

KINDS: list[str] = []  # what each kind is called in a profile


def _kind(name: str) -> int:
    KINDS.append(name)
    return len(KINDS) - 1


BEGIN = _kind("begin")
PACK = _kind("pack")
WAIT = _kind("wait")
GATHER = _kind("gather")
UPDATE = _kind("update")
READ = _kind("read tokens")
EMBED = _kind("embedding")
NORM = _kind("layer norm")
QKV = _kind("qkv")
ATTENTION = _kind("attention")
PROJECTION = _kind("attention projection")
UP = _kind("feed-forward up")
GELU = _kind("gelu")
DOWN = _kind("feed-forward down")
HEAD = _kind("head")
DX = _kind("linear dx")
DW = _kind("linear dw")
LINEAR_BACKWARD = _kind("linear backward")
GELU_BACKWARD = _kind("gelu backward")
ATTENTION_BACKWARD = _kind("attention backward")
NORM_BACKWARD = _kind("layer norm backward")
REARRANGE = _kind("rearrange")
RESIDUAL = _kind("bias and residual backward")
EMBED_BACKWARD = _kind("embedding backward")
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
