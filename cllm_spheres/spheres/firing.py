"""Faults on purpose, in the workers: what is due here and now happens, once, whoever takes over afterwards.

The table of faults lies in shared memory, so a fault that has fired stays so when its worker is replaced.
"""

from __future__ import annotations

import numpy as np

from cllm_spheres import faults as F
from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels import progress as P
from cllm_spheres.kernels.arrays import doubles, integers
from cllm_spheres.kernels.sizes import PROGRESS_WORDS
from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres.atomics import exchange_if
from cllm_spheres.spheres.context import Context as C
from cllm_spheres.spheres.context import mine


@kernel
def _take(x, phase, step, sphere):
    """The action of a fault that is due for a sphere, and is taken hereby; 0: none."""
    for i in range(x[C.NUM_FAULTS]):
        at = x[C.FAULTS] + i * M.FAULT_WORDS * 8
        fault = integers(at, M.FAULT_WORDS)
        due = fault[M.F_PHASE] == phase and fault[M.F_STEP] == step and fault[M.F_SPHERE] == sphere
        if due and exchange_if(at + 8 * M.F_FIRED, 0, 1) == 0:
            return fault[M.F_ACTION]
    return 0


@kernel
def arm(x, step, sphere):
    """Before a shard is computed: set what happens in the middle of its forward or backward. True: it gives NaN."""
    progress = integers(mine(x, M.W_PROGRESS), PROGRESS_WORDS)
    # Where the lower layers are frozen the backward pass ends above them.
    middle = progress[0] + (x[C.LAYERS] + 1) // 2
    middle_back = progress[0] + x[C.LAYERS] + (x[C.BACKWARD_LAYERS] + 1) // 2
    forward, backward = _take(x, F.FORWARD, step, sphere), _take(x, F.BACKWARD, step, sphere)
    progress[P.FORWARD], progress[P.FORWARD + 1] = middle, forward
    progress[P.BACKWARD], progress[P.BACKWARD + 1] = middle_back, backward
    return forward == F.NAN or backward == F.NAN


@kernel
def fire(x, phase, step):
    """What is due for any sphere that this worker hosts; returns F.NAN where numbers are to be spoiled.

    In the gather that is the loss of the sphere: the gradient's blocks may be another worker's.
    """
    spoil = 0
    if x[C.NUM_FAULTS] > 0:
        for sphere in range(x[C.WORKER], x[C.NUM_SPHERES], x[C.NUM_WORKERS]):
            action = _take(x, phase, step, sphere)
            P.act(action)
            if action == F.NAN:
                spoil = action
                if phase == F.GATHER:
                    doubles(x[C.SPHERES] + sphere * M.SPHERE_WORDS * 8, M.SPHERE_WORDS)[M.P_LOSS] = np.nan
    return spoil
