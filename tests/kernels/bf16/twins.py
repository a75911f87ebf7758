"""bfloat16 and its tiles again, slowly: rounding by integers, every form by the place of each element.

Importing this skips the module that does so where the CPU has no bfloat16 arithmetic: its kernels cannot even be
compiled there.
"""

from __future__ import annotations

import faulthandler
import os
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest

from cllm_spheres.crystal.cpu import bf16_backend

BACKEND = bf16_backend()
if BACKEND is None:
    pytest.skip("no AVX512-BF16, and so no bfloat16 kernels", allow_module_level=True)

from cllm_spheres.kernels.bf16.multiply import begin, end  # noqa: E402

# A bfloat16 has 8 bits: rounding to nearest moves a number by at most 2**-8 of itself (half of its last bit, 2**-7).
BF16 = 2**-8
# Of sums in float32, as FLOAT32 in tests/check.py: a few hundred terms are off by some 1e-6 of their largest.
FLOAT32 = 1e-5


def padded(n):
    """n raised to a multiple of 32."""
    return -(-n // 32) * 32


def to_bits(x):
    """float32 -> the uint16 of the nearest bfloat16, ties to even; subnormals -> zero of their sign; NaN stays NaN."""
    x = np.ascontiguousarray(x, np.float32)
    bits = x.view(np.uint32).astype(np.uint64)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    subnormal = (bits & 0x7F800000) == 0
    quiet = (bits >> 16) | 0x40
    result = np.where(np.isnan(x), quiet, np.where(subnormal, (bits >> 31) << 15, nearest))
    return result.astype(np.uint16)


def from_bits(bits):
    """uint16 of bfloat16 -> float32."""
    return (np.asarray(bits, np.uint32) << 16).view(np.float32)


def rounded(x):
    """float32 -> the nearest bfloat16s as float64, to compute with."""
    return from_bits(to_bits(x)).astype(np.float64)


@cache
def places(form, n, c):
    """[n, c], both multiples of 32: where in its form, counted in bfloat16s, each element of a matrix lies."""
    place_NC = np.empty((n, c), np.int64)
    for i in range(n):
        for j in range(c):
            if form == "rows":  # a line is a row's 32 channels
                tile, line, at = i // 16 * (c // 32) + j // 32, i % 16, j % 32
            elif form == "flipped":  # a line is two channels of 16 rows
                tile, line, at = i // 16 * (c // 32) + j // 32, j % 32 // 2, 2 * (i % 16) + j % 2
            elif form == "pairs":  # a line is 16 channels of two rows
                tile, line, at = j // 16 * (n // 32) + i // 32, i % 32 // 2, 2 * (j % 16) + i % 2
            else:  # columns: a line is a channel's 32 rows
                tile, line, at = j // 16 * (n // 32) + i // 32, j % 16, i % 32
            place_NC[i, j] = 512 * tile + 32 * line + at
    assert len(np.unique(place_NC)) == n * c == place_NC.max() + 1
    return place_NC


FORMS = ("rows", "flipped", "pairs", "columns")


def form_of(form, x, n=None, c=None):
    """The uint16s of one of the FORMS of a matrix of any size, padded with zeros to [n, c] or to multiples of 32."""
    whole = np.zeros((n or padded(x.shape[0]), c or padded(x.shape[1])), np.float32)
    whole[: x.shape[0], : x.shape[1]] = x
    result = np.empty(whole.size, np.uint16)
    result[places(form, *whole.shape)] = to_bits(whole)
    return result


def matrix_of(form, bits, n, c):
    """float32[n, c] out of one of its FORMS; n, c padded."""
    return from_bits(bits[places(form, n, c)])


UNWRITTEN = 0xFFC1  # a NaN that no kernel writes


@contextmanager
def room(size):
    """uint16[size] for a form, with margins that must be untouched at the end; begins as NaN."""
    whole = np.full(size + 64, UNWRITTEN, np.uint16)
    yield whole[32 : 32 + size]
    assert (whole[:32] == UNWRITTEN).all() and (whole[-32:] == UNWRITTEN).all(), "a kernel wrote outside its form"


@contextmanager
def tiles():
    """The tile registers, for kernels that the model calls after it has taken them."""
    scratch = np.zeros(64, np.uint8)
    begin(scratch.ctypes.data)
    try:
        yield
    finally:
        end()


def survives(function):
    """True where function() ends well; False where it dies, as of reading what it must not."""
    child = os.fork()
    if child == 0:
        code = 1
        faulthandler.disable()  # a death here is an answer, not a crash to report
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
