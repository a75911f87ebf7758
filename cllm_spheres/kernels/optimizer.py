"""The gathered gradient and a decision -> new parameters and moments, block by block through a redo slot.

The update overwrites its own inputs, so it cannot simply be done again. A new block is first written to a slot,
the slot is published, then copied into place, then done is published: whoever finds a published slot copies it
again, and nothing is half applied, wherever the writer died.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types

from cllm_spheres.crystal.jit import entry, kernel
from cllm_spheres.kernels.arrays import doubles, f4, floats
from cllm_spheres.kernels.fpu import flush_subnormals, restore
from cllm_spheres.kernels.sizes import BLOCK

ADAMW, SGD = 0, 1
EPSILON = 1e-8
# The decision of a step, float64 words: what the update of every block needs besides the block.
(D_FACTOR, D_LR, D_CORRECTION_1, D_CORRECTION_2, D_BETA1, D_BETA2, D_DECAY) = range(7)
DECISION_WORDS = 8
_i8 = types.int64


@kernel
def power(base, exponent):
    """base**exponent, exponent >= 0 and whole, by repeated squaring in float64."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


@entry(_i8(_i8, _i8, _i8, _i8, _i8, _i8, _i8, _i8, _i8))
def update_block(kind, decision, gradient, params, moments, squares, slot, block, decays):
    """slot = the new parameters, moments and squares of a block (3 x 4,096 float32); nothing else is written.

    gradient: the address of this block's; params, moments, squares: addresses of the first block's.
    adamw: m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; p = p (1 - lr decay) - lr/c1 m / (sqrt(v/c2) + eps), with
    c = 1 - b^t. Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019).
    sgd: m = b1 m + g; p = p (1 - lr decay) - lr m; it has no squares.
    """
    state = flush_subnormals()
    d = doubles(decision, DECISION_WORDS)
    at = 4 * block * BLOCK
    g, p, m = floats(gradient, BLOCK), floats(params + at, BLOCK), floats(moments + at, BLOCK)
    new_p, new_m = floats(slot, BLOCK), floats(slot + 4 * BLOCK, BLOCK)
    factor, beta1, lr = f4(d[D_FACTOR]), f4(d[D_BETA1]), d[D_LR]
    shrink = f4(1.0 - lr * d[D_DECAY]) if decays else f4(1)
    if kind == ADAMW:
        v, new_v = floats(squares + at, BLOCK), floats(slot + 8 * BLOCK, BLOCK)
        beta2 = f4(d[D_BETA2])
        rest1, rest2 = f4(1.0 - d[D_BETA1]), f4(1.0 - d[D_BETA2])
        rate = f4(lr / d[D_CORRECTION_1])
        root = f4(1.0 / math.sqrt(d[D_CORRECTION_2]))
        epsilon = f4(EPSILON)
        for i in range(BLOCK):
            gi = g[i] * factor
            mi = beta1 * m[i] + rest1 * gi
            vi = beta2 * v[i] + rest2 * (gi * gi)
            new_m[i] = mi
            new_v[i] = vi
            new_p[i] = p[i] * shrink - rate * mi / (np.sqrt(vi) * root + epsilon)
    else:
        rate = f4(lr)
        for i in range(BLOCK):
            mi = beta1 * m[i] + g[i] * factor
            new_m[i] = mi
            new_p[i] = p[i] * shrink - rate * mi
    restore(state)
    return 0


@entry(_i8(_i8, _i8, _i8, _i8, _i8, _i8))
def commit_block(kind, params, moments, squares, slot, block):
    """Copy a published slot into place; doing it again changes nothing."""
    at = 4 * block * BLOCK
    floats(params + at, BLOCK)[:] = floats(slot, BLOCK)
    floats(moments + at, BLOCK)[:] = floats(slot + 4 * BLOCK, BLOCK)
    if kind == ADAMW:
        floats(squares + at, BLOCK)[:] = floats(slot + 8 * BLOCK, BLOCK)
    return 0
