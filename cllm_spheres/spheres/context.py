"""What a worker knows, as one array of int64, and how it waits for the others.

x is that array; an index into it is a member of `Context`. A barrier is a counter and a futex word: whoever
arrives last releases the others, and may do before what has to be done once.
"""

from __future__ import annotations

from enum import IntEnum

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels.trace import clock_ns
from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres.atomics import add, load, pause, store, wait_while, wake_all

# Indices into what a worker knows: numbers, then addresses. SHARD and WINDOW are registers of model/record.py, of the
# program that trains and of the one that evaluates.
Context = IntEnum(
    "Context",
    """
    WORKER NUM_WORKERS NUM_SPHERES FIRST_BLOCK LAST_BLOCK NUM_BLOCKS DECAYING_BLOCKS SPIN
    BATCH_SIZE BLOCK_SIZE SEED OPTIMIZER SKIP_NONFINITE HAS_DROPOUT STRIDE ITEM_BYTES
    TRAIN_TOKENS VAL_TOKENS NUM_TENSORS PACK_UNITS FROZEN_UNITS KEEPS_SUM LAYERS BACKWARD_LAYERS NUM_FAULTS
    CONTROL DECISION WORKERS SPHERES RING RATES WINDOW_STARTS WINDOW_LENGTHS
    WINDOW_FIRSTS WINDOW_LOSSES WINDOW_HITS NORMS UPDATED SLOTS SLOT FAULTS
    PARAMS FROZEN MOMENTS SQUARES GRADIENT PACKED SEGMENTS
    BLOCK_SUM TRAIN VAL INPUTS TARGETS PLACES VALUES CONSTANTS
    SHARD WINDOW PACK_UNIT PACK_TABLE TRACE
    """,
    start=0,
)
CONTEXT_WORDS = len(Context)


@kernel
def word(x, line):
    """The address of a control word."""
    return x[Context.CONTROL] + line * M.LINE


@kernel
def mine(x, index):
    """The address of one of this worker's words."""
    return x[Context.WORKERS] + (x[Context.WORKER] * M.WORKER_WORDS + index) * 8


@kernel
def now(x):
    """Monotonic nanoseconds."""
    return clock_ns(1, mine(x, M.W_CLOCK))


@kernel
def say(x, state):
    """Publish what this worker does: a member of M.State."""
    store(mine(x, M.W_STATE), state)


@kernel
def ring_bell(x):
    """Wake Node Zero."""
    add(word(x, M.BELL), 1)
    wake_all(word(x, M.BELL))


@kernel
def arrive(x):
    """Come to the barrier; True for the last, who must `release` the others."""
    store(mine(x, M.W_ARRIVED), load(word(x, M.RELEASE)) + 1)
    return add(word(x, M.ARRIVED), 1) + 1 == x[Context.NUM_WORKERS]


@kernel
def release(x):
    """Let the others go on from the barrier."""
    store(word(x, M.ARRIVED), 0)
    add(word(x, M.RELEASE), 1)
    if x[Context.NUM_WORKERS] > 1:
        wake_all(word(x, M.RELEASE))


@kernel
def wait_for_release(x, seen):
    """Wait at the barrier where RELEASE was `seen`; False where the command was aborted meanwhile."""
    say(x, M.State.WAITING)
    address = word(x, M.RELEASE)
    for _ in range(x[Context.SPIN]):
        if load(address) != seen:
            return True
        pause()
    while load(address) == seen:
        if load(word(x, M.ABORT)) != 0:
            return False
        wait_while(address, seen, word(x, M.LONG_TIMEOUT))
    return True


@kernel
def meet(x):
    """A barrier where nothing has to be done once; False where the command was aborted."""
    seen = load(word(x, M.RELEASE))
    if arrive(x):
        release(x)
        return True
    return wait_for_release(x, seen)
