"""What every worker runs: commands, and the barriers between the phases of a step, in one jitted call without the GIL.

Whoever arrives last at a barrier does what has to be done once: it adds the norms and decides (clip, skip, halt)
after the gather, and writes the step's record after the update. All of that is a pure function of what lies in shared
memory, so it does not matter who it is. Node Zero gives commands of up to 4,096 steps and reads the records; it is not
in the path of a step.

Packing stands at the start of every step and evaluation, so after a resume or a recovery nothing has to be rebuilt.
A command that was aborted is given again from the first step that is not whole: spheres that are complete stay so, and
an update that had begun goes on.
"""

from __future__ import annotations

from numba import types

from cllm_spheres import faults as F
from cllm_spheres.crystal.jit import entry, kernel
from cllm_spheres.kernels import trace as T
from cllm_spheres.kernels.arrays import doubles, integers
from cllm_spheres.kernels.optimizer import DECISION_WORDS
from cllm_spheres.kernels.trace import mark
from cllm_spheres.model import record as R
from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres import phases
from cllm_spheres.spheres.atomics import add, load, store, wait_while
from cllm_spheres.spheres.context import (
    CONTEXT_WORDS,
    arrive,
    meet,
    mine,
    now,
    release,
    ring_bell,
    say,
    wait_for_release,
    word,
)  # fmt: skip
from cllm_spheres.spheres.context import Context as C
from cllm_spheres.spheres.firing import fire


@kernel
def _begin_trace(x, step):
    """The address of this worker's trace in the step that is to be traced, else 0; the ops find it in the registers."""
    wanted = x[C.TRACE] != 0 and load(word(x, M.TRACED_STEP)) == step
    trace = x[C.TRACE] if wanted else 0
    integers(x[C.SHARD], R.REGISTERS)[R.TRACE] = trace
    if wanted:
        integers(trace, T.HEADER_WORDS)[0] = 0
        mark(trace, T.BEGIN)
    return trace


@kernel
def _spent(x, index, since):
    """Add the time since then to one of this worker's words; returns what time it is now."""
    end = now(x)
    integers(mine(x, index), 1)[0] += end - since
    return end


@kernel
def _compute_and_decide(x, step, index, trace):
    """Everything of a step before its update; False where aborted."""
    at = x[C.RING] + index * M.RECORD_WORDS * 8
    record = integers(at, M.RECORD_WORDS)
    start = packed = computing = now(x)
    if x[C.PACK_UNITS] > 0:
        say(x, M.State.PACKING)
        phases.pack(x)
        mark(trace, T.PACK)
        packed = _spent(x, M.W_PACK_NS, start)
        if not meet(x):
            return False
        mark(trace, T.WAIT)
        computing = _spent(x, M.W_WAIT_NS, packed)
    say(x, M.State.COMPUTING)
    if not phases.compute(x, step, trace):
        return False
    computed = _spent(x, M.W_COMPUTE_NS, computing)

    seen = load(word(x, M.RELEASE))
    last = arrive(x)
    fire(x, F.BARRIER, step)
    if last:
        record[M.R_COMPUTED_NS] = now(x)
        for total in (M.R_PACK_SUM, M.R_COMPUTE_SUM, M.R_GATHER_SUM, M.R_UPDATE_SUM):
            record[total] = 0
        release(x)
    elif not wait_for_release(x, seen):
        return False
    mark(trace, T.WAIT)
    gathering = _spent(x, M.W_WAIT_NS, computed)
    say(x, M.State.GATHERING)
    phases.gather(x, step)
    mark(trace, T.GATHER)
    gathered = _spent(x, M.W_GATHER_NS, gathering)
    add(at + 8 * M.R_PACK_SUM, packed - start)
    add(at + 8 * M.R_COMPUTE_SUM, computed - computing)
    add(at + 8 * M.R_GATHER_SUM, gathered - gathering)

    seen = load(word(x, M.RELEASE))
    if arrive(x):
        record[M.R_GATHERED_NS] = now(x)
        phases.decide(x, step, index)
        release(x)
    elif not wait_for_release(x, seen):
        return False
    mark(trace, T.WAIT)
    _spent(x, M.W_WAIT_NS, gathered)
    return True


@kernel
def _update_and_finish(x, step, index, verdict, trace):
    """The rest of a step; False where aborted."""
    start = now(x)
    say(x, M.State.UPDATING)
    if verdict == phases.UPDATE:
        phases.update(x, step)
    mark(trace, T.UPDATE)
    updated = _spent(x, M.W_UPDATE_NS, start)
    add(x[C.RING] + 8 * (index * M.RECORD_WORDS + M.R_UPDATE_SUM), updated - start)

    seen = load(word(x, M.RELEASE))
    if arrive(x):
        phases.finish(x, step, index)
        release(x)
    elif not wait_for_release(x, seen):
        return False
    mark(trace, T.WAIT)
    _spent(x, M.W_WAIT_NS, updated)
    return True


@kernel
def _steps(x, first, last):
    """Steps first .. last - 1; False where the command was aborted."""
    base = load(word(x, M.BASE))
    for step in range(first, last):
        index = step - base
        trace = _begin_trace(x, step)
        if index == 0 and x[C.WORKER] == 0:
            store(word(x, M.STEP_START), now(x))
        if load(word(x, M.GATE)) < step:
            if not _compute_and_decide(x, step, index, trace):
                return False
        else:  # an update was interrupted: only the rest of it is due
            say(x, M.State.UPDATING)
            phases.repair(x, step)
            if not meet(x):
                return False
        verdict = doubles(x[C.DECISION], DECISION_WORDS)[phases.D_VERDICT]
        if verdict == phases.END:
            return True
        if not _update_and_finish(x, step, index, verdict, trace):
            return False
        if load(word(x, M.HALT)) != 0:
            return True
    return True


@kernel
def _evaluate(x, first, last):
    """The losses of the pinned windows first .. last - 1; False where aborted before."""
    if x[C.PACK_UNITS] > 0:
        say(x, M.State.PACKING)
        phases.pack(x)
        if not meet(x):
            return False
    say(x, M.State.EVALUATING)
    return phases.evaluate(x, first, last)


@entry(types.int64(types.int64))
def work(context):
    """A worker's life: commands until EXIT. context: the address of int64[CONTEXT_WORDS]. Returns 0."""
    x = integers(context, CONTEXT_WORDS)
    last_command = load(word(x, M.COMMAND))  # of one that replaces another: a command that was aborted
    store(mine(x, M.W_LEFT), last_command)
    say(x, M.State.IDLE)
    store(mine(x, M.W_READY), 1)
    ring_bell(x)
    while True:
        while load(word(x, M.COMMAND)) == last_command:
            wait_while(word(x, M.COMMAND), last_command, word(x, M.LONG_TIMEOUT))
        last_command = load(word(x, M.COMMAND))
        kind, first, last = load(word(x, M.KIND)), load(word(x, M.FIRST)), load(word(x, M.LAST))
        if kind == M.EXIT:
            say(x, M.State.ENDED)
            return 0
        whole = True
        if kind == M.STEPS:
            whole = _steps(x, first, last)
        elif kind == M.EVALUATE:
            whole = _evaluate(x, first, last)
        elif kind == M.REHEARSE and x[C.WORKER] < last:
            phases.rehearse(x)
        elif kind == M.MEET:  # barriers and nothing else, to be timed
            for _ in range(first, last):
                whole = whole and meet(x)
        elif kind == M.INITIALISE:
            phases.initialise(x)
        elif kind == M.PACK_FROZEN:
            phases.pack_frozen(x)
        if whole:
            say(x, M.State.IDLE)
            seen = load(word(x, M.RELEASE))
            if arrive(x):
                store(word(x, M.FINISHED), last_command)
                release(x)
                ring_bell(x)
            else:
                wait_for_release(x, seen)
        say(x, M.State.IDLE)
        store(mine(x, M.W_LEFT), last_command)
        if load(word(x, M.ABORT)) != 0:
            ring_bell(x)
