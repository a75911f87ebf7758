"""The phases of a step, as a worker runs them on its own share.

    pack:    its units of the weights in the form that the kernels read, for dtypes that have one -> packed weights
    compute: for each sphere that the worker hosts: read its windows, forward, backward      -> segments
    gather:  for each block of its span: add the segments in sphere order, squared norm      -> gradient, norms
             (with one or two spheres only the norms: the update adds again)
    repair:  blocks that lie finished in a redo slot, where an update was interrupted        -> parameters
    update:  for each block of its span: the optimizer through the redo slot                 -> parameters

`decide` and `finish` are what one worker does for all, after the gather and after the update. Every phase can be done
again: outputs never overlap inputs, and the update goes through the slot. Which spheres are complete and which blocks
are updated stands beside them, so that what is left can be shared out among any number of workers.
"""

from __future__ import annotations

import numpy as np
from numba import types

from cllm_spheres import faults as F
from cllm_spheres.crystal.jit import at_address, kernel
from cllm_spheres.crystal.random import PURPOSE_DROPOUT, key_of
from cllm_spheres.kernels import trace as T
from cllm_spheres.kernels.arrays import doubles, floats, integers, tokens
from cllm_spheres.kernels.gather import clip_factor, gather_block, global_norm, sum_block
from cllm_spheres.kernels.optimizer import (
    D_BETA1,
    D_BETA2,
    D_CORRECTION_1,
    D_CORRECTION_2,
    D_DECAY,
    D_FACTOR,
    D_LR,
    DECISION_WORDS,
    commit_block,
    power,
    update_block,
)  # fmt: skip
from cllm_spheres.kernels.sizes import BLOCK, SLOT_FLOATS
from cllm_spheres.kernels.trace import clock_ns, mark
from cllm_spheres.model import record as R
from cllm_spheres.model.initialise import initialise_block
from cllm_spheres.model.run import compute_shard, run_once
from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres.atomics import exchange_if, load, store
from cllm_spheres.spheres.context import Context as C
from cllm_spheres.spheres.context import mine, now, word
from cllm_spheres.spheres.firing import arm, fire
from cllm_spheres.text.batches import read_window, shard, window_start

# The phases' one machine code, called by address; the packing of a dtype stands in the context.
_i8 = types.int64
_pack_unit = at_address(_i8(*[_i8] * 5))
_compute_shard = compute_shard.external
_run_once = run_once.external
_initialise_block = initialise_block.external
_gather_block = gather_block.external
_sum_block = sum_block.external
_global_norm = global_norm.external
_update_block = update_block.external
_commit_block = commit_block.external
# float64 constants of a run.
K_CLIP, K_BETA1, K_BETA2, K_DECAY = range(4)
# The last word of the decision: update the weights, skip that, or end before it (not finite, or the gate was closed).
D_VERDICT = DECISION_WORDS - 1
UPDATE, SKIP, END = 0.0, 1.0, 2.0


@kernel
def initialise(x):
    """The first weights of this worker's span."""
    for block in range(x[C.FIRST_BLOCK], x[C.LAST_BLOCK]):
        _initialise_block(x[C.PARAMS], x[C.PLACES], x[C.VALUES], x[C.NUM_TENSORS], x[C.SEED], block)


@kernel
def pack(x):
    """This worker's units of the packed weights that are trained; nothing where the kernels read float32."""
    _pack(x, 0, x[C.PACK_UNITS])


@kernel
def pack_frozen(x):
    """This worker's units of the packed weights that stay as they are."""
    _pack(x, x[C.PACK_UNITS], x[C.FROZEN_UNITS])


@kernel
def _pack(x, first, units):
    worker, workers = x[C.WORKER], x[C.NUM_WORKERS]
    for unit in range(worker * units // workers, (worker + 1) * units // workers):
        _pack_unit(x[C.PACK_UNIT], x[C.PACK_TABLE], x[C.PARAMS], x[C.FROZEN], x[C.PACKED], first + unit)


@kernel
def compute(x, step, trace):
    """Forward and backward of every sphere that this worker hosts, of step `step` (from 1); False where aborted.

    What was complete before a loss is not computed again.
    """
    key = np.int64(key_of(x[C.SEED], PURPOSE_DROPOUT, step)) if x[C.HAS_DROPOUT] else 0
    length = x[C.BLOCK_SIZE]
    registers, numbers = integers(x[C.SHARD], R.REGISTERS), doubles(x[C.SHARD], R.REGISTERS)
    registers[R.KEY], registers[R.LENGTH] = key, length
    numbers[R.SCALE] = 1.0 / (x[C.BATCH_SIZE] * length)
    for sphere in range(x[C.WORKER], x[C.NUM_SPHERES], x[C.NUM_WORKERS]):
        words = x[C.SPHERES] + sphere * M.SPHERE_WORDS * 8
        if load(words + 8 * M.P_COMPLETE) == step:
            continue
        if load(word(x, M.ABORT)) != 0:
            return False
        start = now(x)
        store(mine(x, M.W_SPHERE), sphere)
        poisons = arm(x, step, sphere)
        mark(trace, T.SPHERE + sphere)
        first, count = shard(x[C.BATCH_SIZE], x[C.NUM_SPHERES], sphere)
        for i in range(count):
            at = window_start(x[C.SEED], (step - 1) * x[C.BATCH_SIZE] + first + i, x[C.TRAIN_TOKENS], length)
            read_window(
                x[C.TRAIN], x[C.ITEM_BYTES], x[C.TRAIN_TOKENS], at,
                tokens(x[C.INPUTS] + 4 * i * length, length), tokens(x[C.TARGETS] + 4 * i * length, length),
            )  # fmt: skip
        mark(trace, T.READ)
        registers[R.COUNT], registers[R.FIRST_SEQUENCE] = count, first
        registers[R.SEGMENT] = x[C.SEGMENTS] + sphere * x[C.STRIDE]
        _compute_shard(x[C.SHARD])
        if poisons:
            floats(x[C.SEGMENTS] + sphere * x[C.STRIDE], 1)[0] = np.nan
        doubles(words, M.SPHERE_WORDS)[M.P_LOSS] = numbers[R.LOSS] + numbers[R.EXCESS]
        doubles(words, M.SPHERE_WORDS)[M.P_CROSS_ENTROPY] = numbers[R.LOSS]
        integers(words, M.SPHERE_WORDS)[M.P_BUSY_NS] += now(x) - start
        integers(words, M.SPHERE_WORDS)[M.P_TOKENS] += count * length
        store(words + 8 * M.P_COMPLETE, step)
    return True


@kernel
def _sum_at(x, block):
    """Where the sum of a block goes: to its place in the gradient, or to this worker's own block."""
    return x[C.GRADIENT] + 4 * BLOCK * block if x[C.KEEPS_SUM] else x[C.BLOCK_SUM]


@kernel
def gather(x, step):
    half = (x[C.FIRST_BLOCK] + x[C.LAST_BLOCK]) // 2
    if x[C.FIRST_BLOCK] == x[C.LAST_BLOCK]:
        fire(x, F.GATHER, step)
    for block in range(x[C.FIRST_BLOCK], x[C.LAST_BLOCK]):
        if block == half:
            fire(x, F.GATHER, step)
        _gather_block(x[C.SEGMENTS], x[C.STRIDE], x[C.NUM_SPHERES], _sum_at(x, block), x[C.NORMS], block)


@kernel
def _finite(values):
    for value in values:  # noqa: SIM110
        if not np.isfinite(value):
            return False
    return True


@kernel
def decide(x, step, index):
    """After the gather, once: the step's record begun, clip and learning rate decided, the verdict laid down.

    The verdict stands before the gate moves: whoever finds the gate open for a step finds all that its update needs.
    """
    norm = _global_norm(x[C.NORMS], x[C.NUM_BLOCKS])
    loss = cross_entropy = 0.0
    for sphere in range(x[C.NUM_SPHERES]):
        words = doubles(x[C.SPHERES] + sphere * M.SPHERE_WORDS * 8, M.SPHERE_WORDS)
        loss += words[M.P_LOSS]
        cross_entropy += words[M.P_CROSS_ENTROPY]
    constants = doubles(x[C.CONSTANTS], 4)
    factor = clip_factor(norm, constants[K_CLIP])
    rate = doubles(x[C.RATES], M.RING)[index]
    t = load(word(x, M.APPLIED)) + 1
    d = doubles(x[C.DECISION], DECISION_WORDS)
    d[D_FACTOR] = factor
    d[D_LR] = rate
    d[D_BETA1], d[D_BETA2], d[D_DECAY] = constants[K_BETA1], constants[K_BETA2], constants[K_DECAY]
    d[D_CORRECTION_1] = 1.0 - power(constants[K_BETA1], t)
    d[D_CORRECTION_2] = 1.0 - power(constants[K_BETA2], t)
    record = doubles(x[C.RING] + index * M.RECORD_WORDS * 8, M.RECORD_WORDS)
    record[M.R_LOSS] = loss / (x[C.BATCH_SIZE] * x[C.BLOCK_SIZE])
    record[M.R_CROSS_ENTROPY] = cross_entropy / (x[C.BATCH_SIZE] * x[C.BLOCK_SIZE])
    record[M.R_NORM] = norm
    record[M.R_CLIPPED] = norm * factor
    record[M.R_LR] = rate
    finite = np.isfinite(norm) and np.isfinite(loss)
    numbers = integers(x[C.RING] + index * M.RECORD_WORDS * 8, M.RECORD_WORDS)
    numbers[M.R_SKIPPED] = 0 if finite else 1
    numbers[M.R_APPLIED] = t if finite else t - 1
    d[D_VERDICT] = UPDATE if finite else SKIP
    # No later step can work where the weights themselves are not finite.
    if not finite and not (x[C.SKIP_NONFINITE] and _finite(floats(x[C.PARAMS], x[C.NUM_BLOCKS] * BLOCK))):
        d[D_VERDICT] = END
        store(word(x, M.HALT), M.HALT_NONFINITE)
    elif exchange_if(word(x, M.GATE), step - 1, step) != step - 1:
        d[D_VERDICT] = END


@kernel
def update(x, step):
    """The optimizer on this worker's span, where a block has not had it in this step."""
    half, fault_due = (x[C.FIRST_BLOCK] + x[C.LAST_BLOCK]) // 2, True
    for block in range(x[C.FIRST_BLOCK], x[C.LAST_BLOCK]):
        updated = x[C.UPDATED] + 8 * block
        if load(updated) == step:
            continue
        gradient = _sum_at(x, block)
        if not x[C.KEEPS_SUM]:
            gradient = _sum_block(x[C.SEGMENTS], x[C.STRIDE], x[C.NUM_SPHERES], gradient, block)
        _update_block(
            x[C.OPTIMIZER], x[C.DECISION], gradient, x[C.PARAMS], x[C.MOMENTS], x[C.SQUARES], x[C.SLOT], block,
            1 if block < x[C.DECAYING_BLOCKS] else 0,
        )  # fmt: skip
        store(mine(x, M.W_SLOT), step * x[C.NUM_BLOCKS] + block)
        if fault_due and block >= half:
            fault_due = False
            if fire(x, F.UPDATE, step) == F.NAN:
                floats(x[C.SLOT], 1)[0] = np.nan
        _commit_block(x[C.OPTIMIZER], x[C.PARAMS], x[C.MOMENTS], x[C.SQUARES], x[C.SLOT], block)
        store(updated, step)
    if fault_due:
        fire(x, F.UPDATE, step)


@kernel
def repair(x, step):
    """Put in place the blocks of an interrupted update that lie finished in a slot, whoever wrote it.

    Before any block of this step is updated again: its weights may be half in place.
    """
    for place in range(x[C.WORKER], x[C.NUM_SPHERES], x[C.NUM_WORKERS]):
        block = load(x[C.WORKERS] + (place * M.WORKER_WORDS + M.W_SLOT) * 8) - step * x[C.NUM_BLOCKS]
        if 0 <= block < x[C.NUM_BLOCKS] and load(x[C.UPDATED] + 8 * block) != step:
            slot = x[C.SLOTS] + place * SLOT_FLOATS * 4
            _commit_block(x[C.OPTIMIZER], x[C.PARAMS], x[C.MOMENTS], x[C.SQUARES], slot, block)
            store(x[C.UPDATED] + 8 * block, step)


@kernel
def finish(x, step, index):
    """After the update, once: the step is whole, its record is written."""
    at = x[C.RING] + index * M.RECORD_WORDS * 8
    record = integers(at, M.RECORD_WORDS)
    end = now(x)
    record[M.R_START_NS] = load(word(x, M.STEP_START))
    record[M.R_END_NS] = end
    record[M.R_REAL_NS] = clock_ns(0, mine(x, M.W_CLOCK))
    store(word(x, M.APPLIED), record[M.R_APPLIED])
    store(at + 8 * M.R_STEP, step)
    store(word(x, M.STEP_START), end)
    store(word(x, M.DONE), step)
    if load(word(x, M.STOP)) != 0:
        store(word(x, M.HALT), M.HALT_STOP)


@kernel
def evaluate(x, first, last):
    """This worker's share of the windows first .. last - 1, loss and hits of each at its index; False: aborted."""
    starts, lengths = integers(x[C.WINDOW_STARTS], last), integers(x[C.WINDOW_LENGTHS], last)
    firsts, losses = integers(x[C.WINDOW_FIRSTS], last), doubles(x[C.WINDOW_LOSSES], last)
    registers = integers(x[C.WINDOW], R.REGISTERS)
    for i in range(first + x[C.WORKER], last, x[C.NUM_WORKERS]):
        if load(word(x, M.ABORT)) != 0:
            return False
        read_window(
            x[C.VAL],
            x[C.ITEM_BYTES],
            x[C.VAL_TOKENS],
            starts[i],
            tokens(x[C.INPUTS], lengths[i]),
            tokens(x[C.TARGETS], lengths[i]),
        )
        registers[R.LENGTH], registers[R.FIRST_ROW] = lengths[i], firsts[i]
        _run_once(x[C.WINDOW])
        losses[i] = doubles(x[C.WINDOW], R.REGISTERS)[R.LOSS]
        integers(x[C.WINDOW_HITS], last)[i] = registers[R.CORRECT]
    return True


@kernel
def rehearse(x):
    """Time the first sequence of this worker's first sphere; the step that follows writes over its segment."""
    length = x[C.BLOCK_SIZE]
    for t in range(length):
        tokens(x[C.INPUTS], length)[t] = 0
        tokens(x[C.TARGETS], length)[t] = 0
    registers = integers(x[C.SHARD], R.REGISTERS)
    registers[R.COUNT], registers[R.LENGTH], registers[R.KEY], registers[R.FIRST_SEQUENCE] = 1, length, 0, 0
    registers[R.SEGMENT] = x[C.SEGMENTS] + x[C.WORKER] * x[C.STRIDE]
    doubles(x[C.SHARD], R.REGISTERS)[R.SCALE] = 1.0 / length
    least = np.int64(1) << 62
    begin = now(x)
    for turn in range(20):
        start = now(x)
        _compute_shard(x[C.SHARD])
        least = min(least, now(x) - start)
        # The first turn takes its pages, too: a second is needed where that can matter.
        if now(x) - begin > (50000000 if turn > 0 else 1000000000):
            break
    store(mine(x, M.W_REHEARSAL_NS), least)
