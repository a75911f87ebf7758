"""What every worker runs: commands, barriers and the three phases of a step, in one jitted call without the GIL.

    compute: for each sphere that the worker hosts: read its windows, forward, backward      -> segments
    gather:  for each block of its span: add the segments in sphere order, squared norm      -> gradient, norms
    update:  for each block of its span: the optimizer through the redo slot                 -> parameters

Between two phases stands a barrier. Whoever arrives last does what has to be done once: it adds the norms and
decides (clip, skip, halt) after the gather, and writes the step's record after the update. All of that is a pure
function of what lies in shared memory, so it does not matter who it is. Node Zero gives commands of up to 4,096
steps and reads the records; it is not in the path of a step.

Every phase can be done again: outputs never overlap inputs, and the update goes through the slot.
"""

from __future__ import annotations

import numpy as np
from numba import types

from cllm_spheres.crystal.jit import entry, kernel
from cllm_spheres.crystal.random import PURPOSE_DROPOUT, key_of
from cllm_spheres.kernels.arrays import doubles, integers, tokens
from cllm_spheres.kernels.gather import clip_factor, gather_block, global_norm
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
from cllm_spheres.model.gpt import compute_shard, evaluate_window
from cllm_spheres.model.initialise import initialise_block
from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres.atomics import add, clock_ns, exchange_if, load, pause, store, wait_while, wake_all
from cllm_spheres.text.batches import read_window, shard, window_start

# What a worker knows, int64: numbers, then addresses.
FIELDS = (
    "worker", "num_workers", "num_spheres", "first_block", "last_block", "num_blocks", "decaying_blocks", "spin",
    "batch_size", "block_size", "seed", "optimizer", "skip_nonfinite", "has_dropout", "stride", "item_bytes",
    "train_tokens", "val_tokens", "num_tensors",
    "control", "decision", "workers", "spheres", "ring", "rates", "window_starts", "window_lengths",
    "window_losses", "norms", "slot", "params", "moments", "squares", "gradient", "segments",
    "geometry", "arena", "train", "val", "inputs", "targets", "places", "values", "constants",
)  # fmt: skip
(
    WORKER, NUM_WORKERS, NUM_SPHERES, FIRST_BLOCK, LAST_BLOCK, NUM_BLOCKS, DECAYING_BLOCKS, SPIN,
    BATCH_SIZE, BLOCK_SIZE, SEED, OPTIMIZER, SKIP_NONFINITE, HAS_DROPOUT, STRIDE, ITEM_BYTES,
    TRAIN_TOKENS, VAL_TOKENS, NUM_TENSORS,
    CONTROL, DECISION, WORKERS, SPHERES, RING_AT, RATES, WINDOW_STARTS, WINDOW_LENGTHS,
    WINDOW_LOSSES, NORMS, SLOT, PARAMS, MOMENTS, SQUARES, GRADIENT, SEGMENTS,
    GEOMETRY, ARENA, TRAIN, VAL, INPUTS, TARGETS, PLACES, VALUES, CONSTANTS,
) = range(len(FIELDS))  # fmt: skip
# The phases' one machine code, called by address.
_compute_shard = compute_shard.external
_evaluate_window = evaluate_window.external
_initialise_block = initialise_block.external
_gather_block = gather_block.external
_global_norm = global_norm.external
_update_block = update_block.external
_commit_block = commit_block.external
# float64 constants of a run.
K_CLIP, K_BETA1, K_BETA2, K_DECAY = range(4)


@kernel
def _word(x, word):
    """The address of a control word."""
    return x[CONTROL] + word * M.LINE


@kernel
def _mine(x, word):
    """The address of one of this worker's words."""
    return x[WORKERS] + (x[WORKER] * M.WORKER_WORDS + word) * 8


@kernel
def _now(x):
    return clock_ns(1, _mine(x, M.W_CLOCK))


@kernel
def _state(x, state):
    store(_mine(x, M.W_STATE), state)


@kernel
def _ring_bell(x):
    add(_word(x, M.BELL), 1)
    wake_all(_word(x, M.BELL))


@kernel
def _arrive(x):
    """Come to the barrier; True for the last, who must `_release` the others."""
    store(_mine(x, M.W_ARRIVED), load(_word(x, M.RELEASE)) + 1)
    return add(_word(x, M.ARRIVED), 1) + 1 == x[NUM_WORKERS]


@kernel
def _release(x):
    store(_word(x, M.ARRIVED), 0)
    add(_word(x, M.RELEASE), 1)
    if x[NUM_WORKERS] > 1:
        wake_all(_word(x, M.RELEASE))


@kernel
def _await(x, word, value):
    """Wait until a control word is no longer `value`; False where the command was aborted meanwhile."""
    address = _word(x, word)
    for _ in range(x[SPIN]):
        if load(address) != value:
            return True
        pause()
    while load(address) == value:
        if load(_word(x, M.ABORT)) != 0:
            return False
        wait_while(address, value, _word(x, M.LONG_TIMEOUT))
    return True


@kernel
def _compute(x, step):
    """Forward and backward of every sphere that this worker hosts, of step `step` (from 1)."""
    key = np.int64(key_of(x[SEED], PURPOSE_DROPOUT, step)) if x[HAS_DROPOUT] else 0
    length = x[BLOCK_SIZE]
    scale = 1.0 / (x[BATCH_SIZE] * length)
    for sphere in range(x[WORKER], x[NUM_SPHERES], x[NUM_WORKERS]):
        start = _now(x)
        first, count = shard(x[BATCH_SIZE], x[NUM_SPHERES], sphere)
        for i in range(count):
            at = window_start(x[SEED], (step - 1) * x[BATCH_SIZE] + first + i, x[TRAIN_TOKENS], length)
            read_window(
                x[TRAIN], x[ITEM_BYTES], x[TRAIN_TOKENS], at,
                tokens(x[INPUTS] + 4 * i * length, length), tokens(x[TARGETS] + 4 * i * length, length),
            )  # fmt: skip
        loss = _compute_shard(
            x[GEOMETRY], x[PARAMS], x[SEGMENTS] + sphere * x[STRIDE], x[ARENA], x[INPUTS], x[TARGETS], count, length,
            scale, key, first, _mine(x, M.W_PROGRESS),
        )  # fmt: skip
        words = x[SPHERES] + sphere * M.SPHERE_WORDS * 8
        doubles(words, M.SPHERE_WORDS)[M.P_LOSS] = loss
        integers(words, M.SPHERE_WORDS)[M.P_BUSY_NS] += _now(x) - start
        integers(words, M.SPHERE_WORDS)[M.P_TOKENS] += count * length
        store(words + 8 * M.P_COMPLETE, step)


@kernel
def _gather(x):
    for block in range(x[FIRST_BLOCK], x[LAST_BLOCK]):
        _gather_block(x[SEGMENTS], x[STRIDE], x[NUM_SPHERES], x[GRADIENT], x[NORMS], block)


@kernel
def _decide(x, step, index):
    """After the gather, once: the step's record begun, clip and learning rate decided.

    0: go on and update; 1: skip the update; 2: halt before the update (not finite, or Node Zero closed the gate).
    """
    norm = _global_norm(x[NORMS], x[NUM_BLOCKS])
    loss = 0.0
    for sphere in range(x[NUM_SPHERES]):
        loss += doubles(x[SPHERES] + sphere * M.SPHERE_WORDS * 8, M.SPHERE_WORDS)[M.P_LOSS]
    constants = doubles(x[CONSTANTS], 4)
    factor = clip_factor(norm, constants[K_CLIP])
    rate = doubles(x[RATES], M.RING)[index]
    t = load(_word(x, M.APPLIED)) + 1
    d = doubles(x[DECISION], DECISION_WORDS)
    d[D_FACTOR] = factor
    d[D_LR] = rate
    d[D_BETA1], d[D_BETA2], d[D_DECAY] = constants[K_BETA1], constants[K_BETA2], constants[K_DECAY]
    d[D_CORRECTION_1] = 1.0 - power(constants[K_BETA1], t)
    d[D_CORRECTION_2] = 1.0 - power(constants[K_BETA2], t)
    record = doubles(x[RING_AT] + index * M.RECORD_WORDS * 8, M.RECORD_WORDS)
    record[M.R_LOSS] = loss / (x[BATCH_SIZE] * x[BLOCK_SIZE])
    record[M.R_NORM] = norm
    record[M.R_CLIPPED] = norm * factor
    record[M.R_LR] = rate
    finite = np.isfinite(norm) and np.isfinite(loss)
    integers(x[RING_AT] + index * M.RECORD_WORDS * 8, M.RECORD_WORDS)[M.R_SKIPPED] = 0 if finite else 1
    if not finite and not x[SKIP_NONFINITE]:
        store(_word(x, M.HALT), M.HALT_NONFINITE)
        return 2
    if exchange_if(_word(x, M.GATE), step - 1, step) != step - 1:
        return 2
    return 0 if finite else 1


@kernel
def _update(x, step):
    """The optimizer on this worker's span; goes on where an interrupted update of the same step was left."""
    unit = x[NUM_BLOCKS] + 1
    blocks_word, slot_word = _mine(x, M.W_BLOCKS), _mine(x, M.W_SLOT)
    done = load(blocks_word) - step * unit
    done = done if done > 0 else 0
    for block in range(x[FIRST_BLOCK] + done, x[LAST_BLOCK]):
        tag = step * unit + block - x[FIRST_BLOCK] + 1
        if load(slot_word) != tag:
            _update_block(
                x[OPTIMIZER], x[DECISION], x[GRADIENT], x[PARAMS], x[MOMENTS], x[SQUARES], x[SLOT], block,
                1 if block < x[DECAYING_BLOCKS] else 0,
            )  # fmt: skip
            store(slot_word, tag)
        _commit_block(x[OPTIMIZER], x[PARAMS], x[MOMENTS], x[SQUARES], x[SLOT], block)
        store(blocks_word, tag)


@kernel
def _finish(x, step, index, skipped):
    """After the update, once: the step is whole, its record is written."""
    at = x[RING_AT] + index * M.RECORD_WORDS * 8
    record = integers(at, M.RECORD_WORDS)
    now = _now(x)
    record[M.R_START_NS] = load(_word(x, M.STEP_START))
    record[M.R_END_NS] = now
    record[M.R_REAL_NS] = clock_ns(0, _mine(x, M.W_CLOCK))
    if not skipped:
        add(_word(x, M.APPLIED), 1)
    store(at + 8 * M.R_STEP, step)
    store(_word(x, M.STEP_START), now)
    store(_word(x, M.DONE), step)
    if load(_word(x, M.STOP)) != 0:
        store(_word(x, M.HALT), M.HALT_STOP)


@kernel
def _meet(x):
    """A barrier where nothing has to be done once; False where the command was aborted."""
    seen = load(_word(x, M.RELEASE))
    if _arrive(x):
        _release(x)
        return True
    _state(x, M.S_WAITING)
    return _await(x, M.RELEASE, seen)


@kernel
def _steps(x, first, last):
    """Steps first .. last - 1; False where the command was aborted."""
    base = first
    for step in range(first, last):
        index = step - base
        record = integers(x[RING_AT] + index * M.RECORD_WORDS * 8, M.RECORD_WORDS)
        start = _now(x)
        if step == first and x[WORKER] == 0:
            store(_word(x, M.STEP_START), start)
        _state(x, M.S_COMPUTING)
        _compute(x, step)
        computed = _now(x)

        seen = load(_word(x, M.RELEASE))
        if _arrive(x):
            record[M.R_COMPUTED_NS] = _now(x)
            record[M.R_COMPUTE_SUM] = 0
            record[M.R_GATHER_SUM] = 0
            record[M.R_UPDATE_SUM] = 0
            _release(x)
        else:
            _state(x, M.S_WAITING)
            if not _await(x, M.RELEASE, seen):
                return False
        gathering = _now(x)
        _state(x, M.S_GATHERING)
        _gather(x)
        gathered = _now(x)
        at = x[RING_AT] + index * M.RECORD_WORDS * 8
        add(at + 8 * M.R_COMPUTE_SUM, computed - start)
        add(at + 8 * M.R_GATHER_SUM, gathered - gathering)

        seen = load(_word(x, M.RELEASE))
        if _arrive(x):
            record[M.R_GATHERED_NS] = _now(x)
            doubles(x[DECISION], DECISION_WORDS)[DECISION_WORDS - 1] = float(_decide(x, step, index))
            _release(x)
        else:
            _state(x, M.S_WAITING)
            if not _await(x, M.RELEASE, seen):
                return False
        verdict = doubles(x[DECISION], DECISION_WORDS)[DECISION_WORDS - 1]
        if verdict == 2.0:
            return True
        updating = _now(x)
        if verdict == 0.0:
            _state(x, M.S_UPDATING)
            _update(x, step)
        updated = _now(x)
        add(at + 8 * M.R_UPDATE_SUM, updated - updating)

        seen = load(_word(x, M.RELEASE))
        if _arrive(x):
            _finish(x, step, index, verdict == 1.0)
            _release(x)
        else:
            _state(x, M.S_WAITING)
            if not _await(x, M.RELEASE, seen):
                return False
        mine = integers(_mine(x, 0), M.WORKER_WORDS)
        mine[M.W_COMPUTE_NS] += computed - start
        mine[M.W_GATHER_NS] += gathered - gathering
        mine[M.W_UPDATE_NS] += updated - updating
        mine[M.W_WAIT_NS] += (gathering - computed) + (updating - gathered) + (_now(x) - updated)
        if load(_word(x, M.HALT)) != 0:
            return True
    return True


@kernel
def _evaluate(x, first, last):
    """The losses of the pinned windows first .. last - 1, each stored at its index."""
    starts, lengths = integers(x[WINDOW_STARTS], last), integers(x[WINDOW_LENGTHS], last)
    losses = doubles(x[WINDOW_LOSSES], last)
    _state(x, M.S_EVALUATING)
    for i in range(first + x[WORKER], last, x[NUM_WORKERS]):
        if load(_word(x, M.ABORT)) != 0:
            return
        read_window(
            x[VAL],
            x[ITEM_BYTES],
            x[VAL_TOKENS],
            starts[i],
            tokens(x[INPUTS], lengths[i]),
            tokens(x[TARGETS], lengths[i]),
        )
        losses[i] = _evaluate_window(
            x[GEOMETRY], x[PARAMS], x[ARENA], x[INPUTS], x[TARGETS], lengths[i], _mine(x, M.W_PROGRESS)
        )


@kernel
def _rehearse(x):
    """Time the first sequence of this worker's first sphere; the step that follows writes over its segment."""
    length = x[BLOCK_SIZE]
    for t in range(length):
        tokens(x[INPUTS], length)[t] = 0
        tokens(x[TARGETS], length)[t] = 0
    least = np.int64(1) << 62
    begin = _now(x)
    for turn in range(20):
        start = _now(x)
        _compute_shard(
            x[GEOMETRY], x[PARAMS], x[SEGMENTS] + x[WORKER] * x[STRIDE], x[ARENA], x[INPUTS], x[TARGETS], 1, length,
            1.0 / length, 0, 0, _mine(x, M.W_PROGRESS),
        )  # fmt: skip
        least = min(least, _now(x) - start)
        # The first turn takes its pages, too: a second is needed where that can matter.
        if _now(x) - begin > (50000000 if turn > 0 else 1000000000):
            break
    store(_mine(x, M.W_REHEARSAL_NS), least)


@entry(types.int64(types.int64))
def work(context):
    """A worker's life: commands until EXIT. context: the address of int64[len(FIELDS)]. Returns 0."""
    x = integers(context, len(FIELDS))
    store(_mine(x, M.W_READY), 1)
    _ring_bell(x)
    last_command = 0
    while True:
        _state(x, M.S_IDLE)
        while load(_word(x, M.COMMAND)) == last_command:
            wait_while(_word(x, M.COMMAND), last_command, _word(x, M.LONG_TIMEOUT))
        last_command = load(_word(x, M.COMMAND))
        kind, first, last = load(_word(x, M.KIND)), load(_word(x, M.FIRST)), load(_word(x, M.LAST))
        if kind == M.EXIT:
            _state(x, M.S_ENDED)
            return 0
        whole = True
        if kind == M.STEPS:
            whole = _steps(x, first, last)
        elif kind == M.EVALUATE:
            _evaluate(x, first, last)
        elif kind == M.REHEARSE and x[WORKER] < last:
            _rehearse(x)
        elif kind == M.INITIALISE:
            for block in range(x[FIRST_BLOCK], x[LAST_BLOCK]):
                _initialise_block(x[PARAMS], x[PLACES], x[VALUES], x[NUM_TENSORS], x[SEED], block)
        if whole:
            seen = load(_word(x, M.RELEASE))
            if _arrive(x):
                store(_word(x, M.FINISHED), last_command)
                _release(x)
                _ring_bell(x)
            else:
                _state(x, M.S_WAITING)
                _await(x, M.RELEASE, seen)
