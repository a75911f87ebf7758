"""Pairs of numbers or of rows -> the same comparison many times, in jitted code: the way in costs nothing.

Each loop over pairs returns a sum of what it computed, so that nothing can be left out, and goes on where the call
before ended: a short call repeated would teach the caches and the branch predictor its pairs.
"""

# N pairs, V tokens, D dimensions

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils

from cllm_spheres.crystal.gcd_lanes import gcd_rows
from cllm_spheres.crystal.jit import kernel
from cllm_spheres.crystal.lanes import Lanes, constant, load, spread, total, variable, vectorised
from cllm_spheres.crystal.primes import gcd
from cllm_spheres.crystal.similarity import _all_divisors, _gcds_of_row, similarity

PAIRS = 512  # of a call; there are more of them, N, at least PAIRS
ACCUMULATORS = 4  # of 16 floats: the sums of a fused multiply-add that are under way at once


@vectorised(types.int64, types.int64, types.int64, result=types.float32)
def dot(b: Any, x: Any, y: Any, size: Any) -> Any:
    """The product of two float32 rows at x and y; size: of a row in bytes, a multiple of 256."""
    sums = [variable(b, spread(b, 0.0)) for _ in range(ACCUMULATORS)]
    with cgutils.for_range_slice(b, constant(0), size, constant(64 * ACCUMULATORS), intp=size.type) as (i, _):
        for k, place in enumerate(sums):
            offset = b.add(i, constant(64 * k))
            b.store(load(b, x, offset).times_plus(load(b, y, offset), Lanes(b, b.load(place))).value, place)
    first, second, third, fourth = (Lanes(b, b.load(place)) for place in sums)
    return total((first + second) + (third + fourth))


@kernel
def euclid(a, b):
    """gcd(a, b) by remainders."""
    while b:
        a, b = b, a % b
    return a


@kernel
def _next(cursor, num_pairs):
    """Where a call begins: PAIRS further than the one before, so that no two in a row are about the same."""
    start = cursor[0]
    cursor[0] = start + PAIRS if start + 2 * PAIRS <= num_pairs else 0
    return start


@kernel
def repeat_binary(times, cursor, a_N, b_N):
    """Stein's gcd."""
    checksum = 0
    for _ in range(times):
        start = _next(cursor, a_N.size)
        for i in range(start, start + PAIRS):
            checksum += gcd(a_N[i], b_N[i])
    return checksum


@kernel
def repeat_euclid(times, cursor, a_N, b_N):
    """Euclid's gcd, unsigned and of 32 bits, which this CPU divides fastest."""
    checksum = 0
    for _ in range(times):
        start = _next(cursor, a_N.size)
        for i in range(start, start + PAIRS):
            checksum += euclid(np.uint32(a_N[i]), np.uint32(b_N[i]))
    return checksum


@kernel
def repeat_similarity(times, cursor, a_N, b_N):
    """The crystal's whole similarity."""
    checksum = 0.0
    for _ in range(times):
        start = _next(cursor, a_N.size)
        for i in range(start, start + PAIRS):
            checksum += similarity(a_N[i], b_N[i], 0.7, 0.3)
    return checksum


@kernel
def repeat_dots(times, cursor, a_N, b_N, table_VD):
    """Dot products of rows of a table."""
    checksum = np.float32(0)
    size = table_VD.shape[1] * 4
    for _ in range(times):
        start = _next(cursor, a_N.size)
        for i in range(start, start + PAIRS):
            checksum += dot(table_VD.ctypes.data + a_N[i] * size, table_VD.ctypes.data + b_N[i] * size, size)
    return checksum


@kernel
def repeat_matrix(times, a_N, b_M, out_NM):
    """gcds of all a with all b."""
    row_M = np.empty_like(b_M)
    for _ in range(times):
        gcd_rows(a_N, b_M, row_M, out_NM)


@kernel
def repeat_rows(times, count, out_N):
    """gcds of 1 .. count with 1 .. count by divisors, row after row into one."""
    starts = np.zeros(count + 2, np.int64)
    num_divisors = 0
    for d in range(1, count + 1):
        num_divisors += count // d
    divisors = np.empty(num_divisors, np.int32)
    _all_divisors(count, starts, divisors)
    checksum = 0
    for _ in range(times):
        for a in range(1, count + 1):
            _gcds_of_row(divisors[starts[a] : starts[a + 1]], out_N)
            checksum += out_N[a - 1]
    return checksum
