"""Threads that compute a pass together: all call each op of the program for their share, and meet behind it.

The words of a team are int64, each in a cache line of its own. A barrier spins for some microseconds, as long as an op
of a small model takes, and then sleeps: another program may have taken a core.
"""

from __future__ import annotations

import numpy as np
from numba import types

from cllm_spheres.crystal.jit import at_address, entry, kernel
from cllm_spheres.inference.registers import MEMBERS, TEAM
from cllm_spheres.kernels.arrays import integers
from cllm_spheres.kernels.fpu import flush_subnormals, restore
from cllm_spheres.model.record import ADDRESS, CALLS, PROGRAM, RECORD_WORDS, REGISTERS
from cllm_spheres.spheres.atomics import add, load, pause, store, wait_while, wake_all

LINE = 8  # words
# Passes begun, arrivals at the barrier, barriers passed, sleepers at either; the longest sleep (seconds, ns); stop.
PASSES, ARRIVED, PASSED, SLEEPERS, LONGEST, STOPPED = (LINE * i for i in range(6))
WORDS = LINE * 6
SPINS = 2000  # pauses, of some 10 to 40 ns each

_i8 = types.int64
_call = at_address(_i8(_i8, _i8))


def new_words() -> np.ndarray:
    """The words of a team that has not begun: int64 [WORDS], at a multiple of 8 bytes."""
    words = np.zeros(WORDS, np.int64)
    words[LONGEST] = 1
    return words


@kernel
def _wait(words, which, value):
    """Until the word is not `value` any more."""
    for _ in range(SPINS):
        if load(words + 8 * which) != value:
            return
        pause()
    add(words + 8 * SLEEPERS, 1)
    while load(words + 8 * which) == value:
        wait_while(words + 8 * which, value, words + 8 * LONGEST)
    add(words + 8 * SLEEPERS, -1)


@kernel
def _say(words, which, value):
    """Give a word its next value, and wake who sleeps for it."""
    store(words + 8 * which, value)
    if add(words + 8 * SLEEPERS, 0) > 0:  # an addition of nothing is ordered behind the store, a load would not be
        wake_all(words + 8 * which)


@kernel
def meet(words, members):
    """A barrier: return when all members have called it. What they wrote before is seen behind it."""
    if members == 1:
        return
    passed = load(words + 8 * PASSED)
    if add(words + 8 * ARRIVED, 1) == members - 1:
        store(words + 8 * ARRIVED, 0)
        _say(words, PASSED, passed + 1)
    else:
        _wait(words, PASSED, passed)


@kernel
def begin(words):
    """Have the helpers begin a pass."""
    _say(words, PASSES, load(words + 8 * PASSES) + 1)


@kernel
def next_pass(words, seen):
    """Wait for the pass after `seen`; its number, or -1 where there is none any more."""
    _wait(words, PASSES, seen)
    return -1 if integers(words + 8 * STOPPED, 1)[0] != 0 else seen + 1


@kernel
def stop(words):
    """Let the helpers end."""
    integers(words + 8 * STOPPED, 1)[0] = 1
    begin(words)


@kernel
def _pass(registers):
    """One pass, by the member whose registers these are."""
    g = integers(registers, REGISTERS)
    team, members, program, calls = g[TEAM], g[MEMBERS], g[PROGRAM], g[CALLS]
    for i in range(calls):
        record = program + 8 * RECORD_WORDS * i
        _call(integers(record, RECORD_WORDS)[ADDRESS], record, registers)
        meet(team, members)


@entry(_i8(_i8))
def run_pass(registers):
    """A pass, by this thread as member 0 and its helpers. Returns 0."""
    state = flush_subnormals()
    g = integers(registers, REGISTERS)
    if g[MEMBERS] > 1:
        begin(g[TEAM])
    _pass(registers)
    restore(state)
    return 0


@entry(_i8(_i8))
def help_passes(registers):
    """A helper's life: its share of every pass, until the team is told to stop. Returns the number of passes."""
    state = flush_subnormals()
    team = integers(registers, REGISTERS)[TEAM]
    seen = 0
    while True:
        number = next_pass(team, seen)
        if number < 0:
            restore(state)
            return seen
        seen = number
        _pass(registers)


@entry(_i8(_i8))
def stop_helpers(words):
    """Let the helpers of a team leave. Returns 0."""
    stop(words)
    return 0
