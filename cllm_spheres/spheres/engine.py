"""What every worker runs: commands, barriers and the phases of a step, in one jitted call without the GIL.

    pack:    its units of the weights in the form that the kernels read, for dtypes that have one -> packed weights
    compute: for each sphere that the worker hosts: read its windows, forward, backward      -> segments
    gather:  for each block of its span: add the segments in sphere order, squared norm      -> gradient, norms
             (with one or two spheres only the norms: the update adds again)
    update:  for each block of its span: the optimizer through the redo slot                 -> parameters

Between two phases stands a barrier. Whoever arrives last does what has to be done once: it adds the norms and
decides (clip, skip, halt) after the gather, and writes the step's record after the update. All of that is a pure
function of what lies in shared memory, so it does not matter who it is. Node Zero gives commands of up to 4,096
steps and reads the records; it is not in the path of a step.

Every phase can be done again: outputs never overlap inputs, and the update goes through the slot. Packing stands at
the start of every step and evaluation, so after a resume or a recovery nothing has to be rebuilt.
"""

from __future__ import annotations

import numpy as np
from numba import types

from cllm_spheres.crystal.jit import at_address, entry, kernel
from cllm_spheres.crystal.random import PURPOSE_DROPOUT, key_of
from cllm_spheres.kernels import trace as T
from cllm_spheres.kernels.arrays import doubles, integers, tokens
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
from cllm_spheres.kernels.sizes import BLOCK
from cllm_spheres.kernels.trace import clock_ns, mark
from cllm_spheres.model import geometry as G
from cllm_spheres.model.initialise import initialise_block
from cllm_spheres.spheres import context as C
from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres.atomics import add, exchange_if, load, store, wait_while
from cllm_spheres.text.batches import read_window, shard, window_start

# The phases' one machine code, called by address; that of a dtype stands in the context.
_i8, _d8 = types.int64, types.float64
_pack_unit = at_address(_i8(*[_i8] * 4))
_compute_shard = at_address(_d8(*[_i8] * 9, _d8, *[_i8] * 3))
_evaluate_window = at_address(_d8(*[_i8] * 8))
_initialise_block = initialise_block.external
_gather_block = gather_block.external
_sum_block = sum_block.external
_global_norm = global_norm.external
_update_block = update_block.external
_commit_block = commit_block.external
# float64 constants of a run.
K_CLIP, K_BETA1, K_BETA2, K_DECAY = range(4)


@kernel
def _pack(x):
    """This worker's units of the packed weights; nothing where the kernels read float32."""
    worker, workers, units = x[C.WORKER], x[C.NUM_WORKERS], x[C.PACK_UNITS]
    for unit in range(worker * units // workers, (worker + 1) * units // workers):
        _pack_unit(x[C.PACK_UNIT], x[C.GEOMETRY], x[C.PARAMS], x[C.PACKED], unit)


@kernel
def _compute(x, step, trace):
    """Forward and backward of every sphere that this worker hosts, of step `step` (from 1)."""
    key = np.int64(key_of(x[C.SEED], PURPOSE_DROPOUT, step)) if x[C.HAS_DROPOUT] else 0
    length = x[C.BLOCK_SIZE]
    scale = 1.0 / (x[C.BATCH_SIZE] * length)
    for sphere in range(x[C.WORKER], x[C.NUM_SPHERES], x[C.NUM_WORKERS]):
        start = C.now(x)
        mark(trace, T.SPHERE + sphere)
        first, count = shard(x[C.BATCH_SIZE], x[C.NUM_SPHERES], sphere)
        for i in range(count):
            at = window_start(x[C.SEED], (step - 1) * x[C.BATCH_SIZE] + first + i, x[C.TRAIN_TOKENS], length)
            read_window(
                x[C.TRAIN], x[C.ITEM_BYTES], x[C.TRAIN_TOKENS], at,
                tokens(x[C.INPUTS] + 4 * i * length, length), tokens(x[C.TARGETS] + 4 * i * length, length),
            )  # fmt: skip
        mark(trace, T.READ)
        loss = _compute_shard(
            x[C.COMPUTE_SHARD],
            x[C.GEOMETRY], x[C.PARAMS], x[C.PACKED], x[C.SEGMENTS] + sphere * x[C.STRIDE], x[C.ARENA], x[C.INPUTS],
            x[C.TARGETS], count, length, scale, key, first, C.mine(x, M.W_PROGRESS),
        )  # fmt: skip
        words = x[C.SPHERES] + sphere * M.SPHERE_WORDS * 8
        doubles(words, M.SPHERE_WORDS)[M.P_LOSS] = loss
        integers(words, M.SPHERE_WORDS)[M.P_BUSY_NS] += C.now(x) - start
        integers(words, M.SPHERE_WORDS)[M.P_TOKENS] += count * length
        store(words + 8 * M.P_COMPLETE, step)


@kernel
def _sum_at(x, block):
    """Where the sum of a block goes: to its place in the gradient, or to this worker's own block."""
    return x[C.GRADIENT] + 4 * BLOCK * block if x[C.KEEPS_SUM] else x[C.BLOCK_SUM]


@kernel
def _gather(x):
    for block in range(x[C.FIRST_BLOCK], x[C.LAST_BLOCK]):
        _gather_block(x[C.SEGMENTS], x[C.STRIDE], x[C.NUM_SPHERES], _sum_at(x, block), x[C.NORMS], block)


@kernel
def _decide(x, step, index):
    """After the gather, once: the step's record begun, clip and learning rate decided.

    0: go on and update; 1: skip the update; 2: halt before the update (not finite, or Node Zero closed the gate).
    """
    norm = _global_norm(x[C.NORMS], x[C.NUM_BLOCKS])
    loss = 0.0
    for sphere in range(x[C.NUM_SPHERES]):
        loss += doubles(x[C.SPHERES] + sphere * M.SPHERE_WORDS * 8, M.SPHERE_WORDS)[M.P_LOSS]
    constants = doubles(x[C.CONSTANTS], 4)
    factor = clip_factor(norm, constants[K_CLIP])
    rate = doubles(x[C.RATES], M.RING)[index]
    t = load(C.word(x, M.APPLIED)) + 1
    d = doubles(x[C.DECISION], DECISION_WORDS)
    d[D_FACTOR] = factor
    d[D_LR] = rate
    d[D_BETA1], d[D_BETA2], d[D_DECAY] = constants[K_BETA1], constants[K_BETA2], constants[K_DECAY]
    d[D_CORRECTION_1] = 1.0 - power(constants[K_BETA1], t)
    d[D_CORRECTION_2] = 1.0 - power(constants[K_BETA2], t)
    record = doubles(x[C.RING_AT] + index * M.RECORD_WORDS * 8, M.RECORD_WORDS)
    record[M.R_LOSS] = loss / (x[C.BATCH_SIZE] * x[C.BLOCK_SIZE])
    record[M.R_NORM] = norm
    record[M.R_CLIPPED] = norm * factor
    record[M.R_LR] = rate
    finite = np.isfinite(norm) and np.isfinite(loss)
    integers(x[C.RING_AT] + index * M.RECORD_WORDS * 8, M.RECORD_WORDS)[M.R_SKIPPED] = 0 if finite else 1
    if not finite and not x[C.SKIP_NONFINITE]:
        store(C.word(x, M.HALT), M.HALT_NONFINITE)
        return 2
    if exchange_if(C.word(x, M.GATE), step - 1, step) != step - 1:
        return 2
    return 0 if finite else 1


@kernel
def _update(x, step):
    """The optimizer on this worker's span; goes on where an interrupted update of the same step was left."""
    unit = x[C.NUM_BLOCKS] + 1
    blocks_word, slot_word = C.mine(x, M.W_BLOCKS), C.mine(x, M.W_SLOT)
    done = load(blocks_word) - step * unit
    done = done if done > 0 else 0
    for block in range(x[C.FIRST_BLOCK] + done, x[C.LAST_BLOCK]):
        tag = step * unit + block - x[C.FIRST_BLOCK] + 1
        if load(slot_word) != tag:
            gradient = _sum_at(x, block)
            if not x[C.KEEPS_SUM]:
                gradient = _sum_block(x[C.SEGMENTS], x[C.STRIDE], x[C.NUM_SPHERES], gradient, block)
            _update_block(
                x[C.OPTIMIZER], x[C.DECISION], gradient, x[C.PARAMS], x[C.MOMENTS], x[C.SQUARES], x[C.SLOT], block,
                1 if block < x[C.DECAYING_BLOCKS] else 0,
            )  # fmt: skip
            store(slot_word, tag)
        _commit_block(x[C.OPTIMIZER], x[C.PARAMS], x[C.MOMENTS], x[C.SQUARES], x[C.SLOT], block)
        store(blocks_word, tag)


@kernel
def _finish(x, step, index, skipped):
    """After the update, once: the step is whole, its record is written."""
    at = x[C.RING_AT] + index * M.RECORD_WORDS * 8
    record = integers(at, M.RECORD_WORDS)
    now = C.now(x)
    record[M.R_START_NS] = load(C.word(x, M.STEP_START))
    record[M.R_END_NS] = now
    record[M.R_REAL_NS] = clock_ns(0, C.mine(x, M.W_CLOCK))
    if not skipped:
        add(C.word(x, M.APPLIED), 1)
    store(at + 8 * M.R_STEP, step)
    store(C.word(x, M.STEP_START), now)
    store(C.word(x, M.DONE), step)
    if load(C.word(x, M.STOP)) != 0:
        store(C.word(x, M.HALT), M.HALT_STOP)


@kernel
def _begin_trace(x, step):
    """The address of this worker's trace in the step that is to be traced, else 0; the kernels find it in the card."""
    wanted = x[C.TRACE] != 0 and load(C.word(x, M.TRACED_STEP)) == step
    trace = x[C.TRACE] if wanted else 0
    integers(x[C.GEOMETRY], 1)[G.TRACE] = trace
    if wanted:
        integers(trace, T.HEADER_WORDS)[0] = 0
        mark(trace, T.BEGIN)
    return trace


@kernel
def _steps(x, first, last):
    """Steps first .. last - 1; False where the command was aborted."""
    base = first
    for step in range(first, last):
        index = step - base
        at = x[C.RING_AT] + index * M.RECORD_WORDS * 8
        record = integers(at, M.RECORD_WORDS)
        start = C.now(x)
        trace = _begin_trace(x, step)
        if step == first and x[C.WORKER] == 0:
            store(C.word(x, M.STEP_START), start)
        packed, computing = start, start
        if x[C.PACK_UNITS] > 0:
            C.say(x, M.S_PACKING)
            _pack(x)
            packed = C.now(x)
            mark(trace, T.PACK)
            if not C.meet(x):
                return False
            mark(trace, T.WAIT)
            computing = C.now(x)
        C.say(x, M.S_COMPUTING)
        _compute(x, step, trace)
        computed = C.now(x)

        seen = load(C.word(x, M.RELEASE))
        if C.arrive(x):
            record[M.R_COMPUTED_NS] = C.now(x)
            for total in (M.R_PACK_SUM, M.R_COMPUTE_SUM, M.R_GATHER_SUM, M.R_UPDATE_SUM):
                record[total] = 0
            C.release(x)
        else:
            C.say(x, M.S_WAITING)
            if not C.wait_for_change(x, M.RELEASE, seen):
                return False
        gathering = C.now(x)
        mark(trace, T.WAIT)
        C.say(x, M.S_GATHERING)
        _gather(x)
        gathered = C.now(x)
        mark(trace, T.GATHER)
        add(at + 8 * M.R_PACK_SUM, packed - start)
        add(at + 8 * M.R_COMPUTE_SUM, computed - computing)
        add(at + 8 * M.R_GATHER_SUM, gathered - gathering)

        seen = load(C.word(x, M.RELEASE))
        if C.arrive(x):
            record[M.R_GATHERED_NS] = C.now(x)
            doubles(x[C.DECISION], DECISION_WORDS)[DECISION_WORDS - 1] = float(_decide(x, step, index))
            C.release(x)
        else:
            C.say(x, M.S_WAITING)
            if not C.wait_for_change(x, M.RELEASE, seen):
                return False
        verdict = doubles(x[C.DECISION], DECISION_WORDS)[DECISION_WORDS - 1]
        if verdict == 2.0:
            return True
        updating = C.now(x)
        mark(trace, T.WAIT)
        if verdict == 0.0:
            C.say(x, M.S_UPDATING)
            _update(x, step)
        updated = C.now(x)
        mark(trace, T.UPDATE)
        add(at + 8 * M.R_UPDATE_SUM, updated - updating)

        seen = load(C.word(x, M.RELEASE))
        if C.arrive(x):
            _finish(x, step, index, verdict == 1.0)
            C.release(x)
        else:
            C.say(x, M.S_WAITING)
            if not C.wait_for_change(x, M.RELEASE, seen):
                return False
        mark(trace, T.WAIT)
        mine = integers(C.mine(x, 0), M.WORKER_WORDS)
        mine[M.W_PACK_NS] += packed - start
        mine[M.W_COMPUTE_NS] += computed - computing
        mine[M.W_GATHER_NS] += gathered - gathering
        mine[M.W_UPDATE_NS] += updated - updating
        mine[M.W_WAIT_NS] += (
            (computing - packed) + (gathering - computed) + (updating - gathered) + (C.now(x) - updated)
        )
        if load(C.word(x, M.HALT)) != 0:
            return True
    return True


@kernel
def _evaluate(x, first, last):
    """The losses of the pinned windows first .. last - 1, each stored at its index; False where aborted."""
    if x[C.PACK_UNITS] > 0:
        C.say(x, M.S_PACKING)
        _pack(x)
        if not C.meet(x):
            return False
    starts, lengths = integers(x[C.WINDOW_STARTS], last), integers(x[C.WINDOW_LENGTHS], last)
    losses = doubles(x[C.WINDOW_LOSSES], last)
    C.say(x, M.S_EVALUATING)
    for i in range(first + x[C.WORKER], last, x[C.NUM_WORKERS]):
        if load(C.word(x, M.ABORT)) != 0:
            return True
        read_window(
            x[C.VAL],
            x[C.ITEM_BYTES],
            x[C.VAL_TOKENS],
            starts[i],
            tokens(x[C.INPUTS], lengths[i]),
            tokens(x[C.TARGETS], lengths[i]),
        )
        losses[i] = _evaluate_window(
            x[C.EVALUATE_WINDOW],
            x[C.GEOMETRY], x[C.PARAMS], x[C.PACKED], x[C.ARENA], x[C.INPUTS], x[C.TARGETS], lengths[i],
            C.mine(x, M.W_PROGRESS),
        )  # fmt: skip
    return True


@kernel
def _rehearse(x):
    """Time the first sequence of this worker's first sphere; the step that follows writes over its segment."""
    length = x[C.BLOCK_SIZE]
    for t in range(length):
        tokens(x[C.INPUTS], length)[t] = 0
        tokens(x[C.TARGETS], length)[t] = 0
    least = np.int64(1) << 62
    begin = C.now(x)
    for turn in range(20):
        start = C.now(x)
        _compute_shard(
            x[C.COMPUTE_SHARD],
            x[C.GEOMETRY], x[C.PARAMS], x[C.PACKED], x[C.SEGMENTS] + x[C.WORKER] * x[C.STRIDE], x[C.ARENA], x[C.INPUTS],
            x[C.TARGETS], 1, length, 1.0 / length, 0, 0, C.mine(x, M.W_PROGRESS),
        )  # fmt: skip
        least = min(least, C.now(x) - start)
        # The first turn takes its pages, too: a second is needed where that can matter.
        if C.now(x) - begin > (50000000 if turn > 0 else 1000000000):
            break
    store(C.mine(x, M.W_REHEARSAL_NS), least)


@entry(types.int64(types.int64))
def work(context):
    """A worker's life: commands until EXIT. context: the address of int64[len(C.FIELDS)]. Returns 0."""
    x = integers(context, len(C.FIELDS))
    store(C.mine(x, M.W_READY), 1)
    C.ring_bell(x)
    last_command = 0
    while True:
        C.say(x, M.S_IDLE)
        while load(C.word(x, M.COMMAND)) == last_command:
            wait_while(C.word(x, M.COMMAND), last_command, C.word(x, M.LONG_TIMEOUT))
        last_command = load(C.word(x, M.COMMAND))
        kind, first, last = load(C.word(x, M.KIND)), load(C.word(x, M.FIRST)), load(C.word(x, M.LAST))
        if kind == M.EXIT:
            C.say(x, M.S_ENDED)
            return 0
        whole = True
        if kind == M.STEPS:
            whole = _steps(x, first, last)
        elif kind == M.EVALUATE:
            whole = _evaluate(x, first, last)
        elif kind == M.REHEARSE and x[C.WORKER] < last:
            _rehearse(x)
        elif kind == M.MEET:  # barriers and nothing else, to be timed
            for _ in range(first, last):
                whole = whole and C.meet(x)
        elif kind == M.INITIALISE:
            for block in range(x[C.FIRST_BLOCK], x[C.LAST_BLOCK]):
                _initialise_block(x[C.PARAMS], x[C.PLACES], x[C.VALUES], x[C.NUM_TENSORS], x[C.SEED], block)
        if whole:
            seen = load(C.word(x, M.RELEASE))
            if C.arrive(x):
                store(C.word(x, M.FINISHED), last_command)
                C.release(x)
                C.ring_bell(x)
            else:
                C.say(x, M.S_WAITING)
                C.wait_for_change(x, M.RELEASE, seen)
