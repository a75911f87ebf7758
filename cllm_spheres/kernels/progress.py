"""How far a shard is: a word raised at every layer, and the place where a fault on purpose happens inside a kernel.

Progress is int64[PROGRESS_WORDS]: layers done; then, for the forward and for the backward, at which count of layers
something happens, and what. 0 is never: the count has been raised before it is compared.
"""

from __future__ import annotations

from numba import types

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.faults import KILL, SEGV, SLOW, SLOW_S, STOP

FORWARD, BACKWARD = 1, 3  # where their two words stand
_SIGKILL, _SIGSEGV, _SIGSTOP = 9, 11, 19
_i4 = types.int32
_getpid = types.ExternalFunction("getpid", _i4())
_kill = types.ExternalFunction("kill", _i4(_i4, _i4))
_sleep = types.ExternalFunction("sleep", types.uint32(types.uint32))


@kernel
def advance(progress, direction):
    """One layer more. progress: int64[PROGRESS_WORDS]; direction: FORWARD or BACKWARD."""
    progress[0] += 1
    if progress[0] == progress[direction]:
        act(progress[direction + 1])


@kernel
def act(action):
    """Do to this process what a fault says; a NaN is for the caller to write."""
    if action == KILL:
        _kill(_getpid(), _i4(_SIGKILL))
    elif action == STOP:
        _kill(_getpid(), _i4(_SIGSTOP))
    elif action == SEGV:
        _kill(_getpid(), _i4(_SIGSEGV))
    elif action == SLOW:
        _sleep(types.uint32(SLOW_S))
