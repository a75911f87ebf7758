"""The runner: registers in, the calls of a program one after the other, loss and the gradient segment out.

`compute_shard`, `evaluate_window` and `compute_logits` are the same for every model and dtype: training, the library
and the tests call the same machine code. All take the address of the registers (record.py) and leave results there.
"""

from __future__ import annotations

from numba import types

from cllm_spheres.crystal.jit import at_address, entry, kernel
from cllm_spheres.kernels.arrays import doubles, integers
from cllm_spheres.kernels.fpu import flush_subnormals, restore
from cllm_spheres.kernels.progress import advance
from cllm_spheres.kernels.sizes import PROGRESS_WORDS
from cllm_spheres.kernels.trace import mark
from cllm_spheres.model import record as R

_i8 = types.int64
_call = at_address(_i8(_i8, _i8))


@kernel
def _run(registers):
    """All calls, for the sequences that the registers name."""
    g = integers(registers, R.REGISTERS)
    g[R.ROWS] = g[R.SEQUENCES] * ((g[R.LENGTH] + g[R.PADDING] - 1) // g[R.PADDING] * g[R.PADDING])
    g[R.THRESHOLD] = g[R.RATE] if g[R.KEY] != 0 else 0
    doubles(registers, R.REGISTERS)[R.KEEP_SCALE] = 1.0 / (1.0 - g[R.THRESHOLD] / 4294967296.0)
    progress = integers(g[R.PROGRESS], PROGRESS_WORDS)
    for i in range(g[R.CALLS]):
        record = g[R.PROGRAM] + 8 * R.RECORD_WORDS * i
        words = integers(record, R.RECORD_WORDS)
        _call(words[R.ADDRESS], record, registers)
        mark(g[R.TRACE], words[R.MARK])
        if words[R.ADVANCE] != 0:
            advance(progress, words[R.ADVANCE])


@entry(_i8(_i8))
def compute_shard(registers):
    """The gradient of COUNT sequences, overwriting the segment; LOSS and EXCESS become the sums of their losses.

    Where soft targets stand beside the targets (SOFT), what is differentiated is LOSS + EXCESS.
    """
    state = flush_subnormals()
    g, results = integers(registers, R.REGISTERS), doubles(registers, R.REGISTERS)
    inputs, targets, count, first = g[R.INPUTS], g[R.TARGETS], g[R.COUNT], g[R.FIRST_SEQUENCE]
    results[R.LOSS] = results[R.EXCESS] = 0.0
    for done in range(0, count, g[R.AT_A_TIME]):
        g[R.INPUTS], g[R.TARGETS] = inputs + 4 * done * g[R.LENGTH], targets + 4 * done * g[R.LENGTH]
        g[R.SEQUENCES] = min(g[R.AT_A_TIME], count - done)
        g[R.FIRST_SEQUENCE] = first + done
        g[R.ACCUMULATE] = done
        _run(registers)
    g[R.INPUTS], g[R.TARGETS], g[R.FIRST_SEQUENCE] = inputs, targets, first
    restore(state)
    return 0


@entry(_i8(_i8))
def run_once(registers):
    """One sequence of LENGTH tokens without dropout, from FIRST_ROW on.

    By a program that evaluates, LOSS becomes its summed loss and CORRECT the number of targets that are the likeliest
    token; by one for logits they go to OUTPUT.
    """
    state = flush_subnormals()
    g, results = integers(registers, R.REGISTERS), doubles(registers, R.REGISTERS)
    g[R.SEQUENCES], g[R.FIRST_SEQUENCE], g[R.KEY], g[R.CORRECT] = 1, 0, 0, 0
    results[R.LOSS] = results[R.EXCESS] = 0.0
    _run(registers)
    restore(state)
    return 0
