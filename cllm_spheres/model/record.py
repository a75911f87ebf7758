"""How an op is called: with a record, which says what it works on, and the registers, which say where that is now.

A program is a run of records, each RECORD_WORDS of int64: the op's address, what its time is called in a profile,
whether it ends a block, and which of its operands it is the first to write; then operands as (register, bytes behind
what stands there), then sizes. An operand that there is not, such as the bias of a layer without one, is (NONE, 0):
its address is 0. What differs from call to call (rows, keys, addresses) stands in the registers, one int64 each.
"""

from __future__ import annotations

import numpy as np
from numba import types

from cllm_spheres.crystal.jit import entry, kernel
from cllm_spheres.crystal.random import combine
from cllm_spheres.kernels.arrays import f4, integers

# Of a record. FIRST has a bit for each operand.
ADDRESS, MARK, ADVANCE, FIRST, OPERANDS = range(5)
MOST_OPERANDS, MOST_SIZES = 20, 12
SIZES = OPERANDS + 2 * MOST_OPERANDS
RECORD_WORDS = SIZES + MOST_SIZES

(
    NONE,  # always 0
    PARAMS,  # addresses of what operands lie in: trainable parameters and their gradient, frozen ones, packed
    FROZEN,  # matrices, activations
    PACKED,
    SEGMENT,
    ARENA,
    PROGRAM,  # the records, and how many
    CALLS,
    AT_A_TIME,  # sequences that are computed together, and to how many tokens each is padded
    PADDING,
    RATE,  # of dropout, times 2**32
    INPUTS,  # ids, int32 [COUNT, LENGTH], of the shard; of the sequences that are computed now
    TARGETS,
    COUNT,
    LENGTH,
    SEQUENCES,  # that are computed now, the number of the first of them in the whole batch, and their padded rows
    FIRST_SEQUENCE,
    ROWS,
    FIRST_ROW,  # from which on losses or logits are wanted
    KEY,  # of dropout, 0 for none; THRESHOLD is RATE or 0, KEEP_SCALE the bits of a float64
    THRESHOLD,
    KEEP_SCALE,
    SCALE,  # what a token's loss counts in the gradient: bits of a float64
    ACCUMULATE,  # 0: what is first written overwrites
    SOFT,  # the address of a card of kernels/soft_targets.py, or 0
    LOSS,  # summed cross-entropy, and what soft targets add to it: bits of float64
    EXCESS,
    CORRECT,  # right predictions
    OUTPUT,  # the address of logits, float32 [LENGTH - FIRST_ROW, V]
    TRACE,  # of kernels/trace.py, or 0
    PROGRESS,  # the address of int64[PROGRESS_WORDS] of kernels/progress.py
) = range(31)
REGISTERS = 32


op = entry(types.int64(types.int64, types.int64))  # decorator: function(record, registers) of two addresses


@kernel
def opened(record, registers):
    """The words of a record, and of the registers."""
    return integers(record, RECORD_WORDS), integers(registers, REGISTERS)


@kernel
def operand(r, g, i):
    """The address of operand i; 0 where there is none."""
    return g[r[OPERANDS + 2 * i]] + r[OPERANDS + 2 * i + 1]


@kernel
def size(r, i):
    """Size i of a record."""
    return r[SIZES + i]


@kernel
def padded_length(g):
    """Rows of each sequence: its tokens, and what pads them."""
    return g[ROWS] // g[SEQUENCES]


@kernel
def is_first(r, i):
    """Whether this record is the first to write operand i."""
    return (r[FIRST] >> i) & 1 != 0


@kernel
def accumulates(r, g, i):
    """Whether gradients of a tensor, operand i, are added to what stands there."""
    return g[ACCUMULATE] != 0 or not is_first(r, i)


@kernel
def number(g, register):
    """A register as float64."""
    return g.view(np.float64)[register]


@kernel
def keep_scale(g):
    """What dropout multiplies by what it keeps, float32."""
    return f4(number(g, KEEP_SCALE))


@kernel
def site_key(g, site):
    """The key of dropout at one place in the model."""
    return combine(types.uint64(g[KEY]), site)
