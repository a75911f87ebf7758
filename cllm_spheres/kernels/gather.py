"""The segments of all spheres -> one gradient, block by block, and what its norm means for the step.

A block is 4,096 parameters, with a constant trip count and no tail: nothing depends on how blocks are shared out.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types

from cllm_spheres.crystal.jit import entry, kernel, reduction
from cllm_spheres.kernels.arrays import doubles, floats
from cllm_spheres.kernels.fpu import flush_subnormals, restore
from cllm_spheres.kernels.sizes import BLOCK

_i8, _d8 = types.int64, types.float64


@kernel
def _add_four(out, a, b, c, d):
    for i in range(BLOCK):
        out[i] = (((out[i] + a[i]) + b[i]) + c[i]) + d[i]


@kernel
def _add_one(out, a):
    for i in range(BLOCK):
        out[i] += a[i]


@reduction
def _sum_of_squares(x):
    total = 0.0
    for i in range(BLOCK):
        y = np.float64(x[i])  # float() would stay float32
        total += y * y
    return total


@entry(_i8(_i8, _i8, _i8, _i8, _i8, _i8))
def gather_block(segments, stride, num_segments, gradient, norms, block):
    """gradient[block] = the sum of that block of all segments, in sphere order; norms[block] = its squared norm.

    segments: address of the first, `stride` bytes apart; gradient float32, norms float64: addresses.
    """
    state = flush_subnormals()
    at = segments + 4 * block * BLOCK
    out = floats(gradient + 4 * block * BLOCK, BLOCK)
    first = floats(at, BLOCK)
    for i in range(BLOCK):
        out[i] = first[i]
    s = 1
    while s + 4 <= num_segments:
        _add_four(
            out, floats(at + s * stride, BLOCK), floats(at + (s + 1) * stride, BLOCK),
            floats(at + (s + 2) * stride, BLOCK), floats(at + (s + 3) * stride, BLOCK),
        )  # fmt: skip
        s += 4
    while s < num_segments:
        _add_one(out, floats(at + s * stride, BLOCK))
        s += 1
    doubles(norms, block + 1)[block] = _sum_of_squares(out)
    restore(state)
    return 0


@entry(_d8(_i8, _i8))
def global_norm(norms, num_blocks):
    """The root of the sum of the blocks' squared norms, added in block order, float64."""
    squares = doubles(norms, num_blocks)
    total = 0.0
    for b in range(num_blocks):
        total += squares[b]
    return math.sqrt(total)


@kernel
def clip_factor(norm, clip):
    """What the gradient is multiplied by: clip / norm where the norm is larger; clip 0 is off."""
    return clip / norm if clip > 0.0 and norm > clip else 1.0
