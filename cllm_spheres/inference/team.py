"""Threads that compute one pass together: a barrier between its phases, and where helpers wait for the next pass.

Words of int64, each in a cache line of its own. A barrier spins for some microseconds, as long as a phase of a small
model takes, and then sleeps: another program may have taken a core.
"""

from __future__ import annotations

import numpy as np
from numba import types

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels.arrays import integers
from cllm_spheres.spheres.atomics import add, load, pause, store, wait_while, wake_all

LINE = 8  # words
# Passes begun, arrivals at the barrier, barriers passed, sleepers at either; the longest sleep (seconds, ns); stop.
PASSES, ARRIVED, PASSED, SLEEPERS, LONGEST, STOPPED = (LINE * i for i in range(6))
WORDS = LINE * 6
SPINS = 2000  # pauses, of some 10 to 40 ns each

_i8 = types.int64


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
