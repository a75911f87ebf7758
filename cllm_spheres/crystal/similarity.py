"""Two numbers -> how alike the crystal finds them; a number -> the numbers most like it.

    s(a, b) = gcd_weight * gcd(a, b) / max(a, b)  +  ulam_weight / (1 + |U(a) - U(b)|)

a and b are numbers from 1 on, a token's rank + 1; U is the place on Ulam's spiral, |.| the Euclidean distance. The
squared distance is a whole number below 2**64 and computed as one. What follows is rounded operation by operation, and
no product is added to, so that none can be fused: the same bits on every machine, alone and in vectors.
"""

# N numbers 1 to count, K neighbours, D divisors

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cllm_spheres.config import MAX_WEIGHT
from cllm_spheres.crystal.jit import kernel
from cllm_spheres.crystal.primes import factorise, gcd
from cllm_spheres.crystal.ulam import place, places
from cllm_spheres.errors import InputError

GCD_WEIGHT, ULAM_WEIGHT = 0.7, 0.3
LARGEST_COUNT = 2**31 - 1
_ROWS = 64  # between two calls of `progress`
_BLOCK = 512  # similarities computed before one is looked at: they stay in the fastest cache
_FEW = 256  # neighbours kept in order as they come; of more than that all are sorted

f8, i4, i8, u8 = np.float64, np.int32, np.int64, np.uint64


@kernel
def gcd_term(common, a, b, weight):
    """weight * gcd(a, b) / max(a, b), float64; common: their greatest common divisor."""
    return weight * f8(common) / f8(max(a, b))


@kernel
def ulam_term(a, b, weight):
    """weight / (1 + |U(a) - U(b)|), float64."""
    ax, ay = place(a)
    bx, by = place(b)
    dx, dy = u8(abs(ax - bx)), u8(abs(ay - by))
    return weight / (1.0 + np.sqrt(f8(dx * dx + dy * dy)))


@kernel
def similarity(a, b, gcd_weight, ulam_weight):
    """s(a, b), float64, of two numbers from 1 to 2**63 - 1."""
    return gcd_term(gcd(a, b), a, b, gcd_weight) + ulam_term(a, b, ulam_weight)


@kernel
def _gcds_of_row(divisors_D, gcd_N):
    """gcd(a, b) of b = 1 .. N by the divisors of a up to N, ascending: the last that divides b is the largest."""
    gcd_N[:] = 1
    for k in range(1, divisors_D.size):
        d = divisors_D[k]
        for b in range(d, gcd_N.size + 1, d):
            gcd_N[b - 1] = d


@kernel
def _row(a, divisors_D, gcd_weight, ulam_weight, gcd_N, out_N):
    _gcds_of_row(divisors_D, gcd_N)
    for i in range(out_N.size):
        b = i8(i + 1)
        out_N[i] = gcd_term(gcd_N[i], a, b, gcd_weight) + ulam_term(a, b, ulam_weight)


def row(a: int, count: int, gcd_weight: float = GCD_WEIGHT, ulam_weight: float = ULAM_WEIGHT) -> npt.NDArray:
    """s(a, b) for b = 1 .. count, float64 [count]. InputError for a below 1, a count or a weight out of range."""
    _check(count, gcd_weight, ulam_weight)
    divisors = [1]
    for p, exponent in factorise(a):
        divisors = [d * p**k for d in divisors for k in range(exponent + 1)]
    divisors_D = np.array(sorted(d for d in divisors if d <= count), np.int64)
    out_N = np.empty(count)
    _row(i8(a), divisors_D, float(gcd_weight), float(ulam_weight), np.empty(count, np.int32), out_N)
    return out_N


@kernel
def _all_divisors(count, starts, divisors):
    """divisors[starts[a] : starts[a + 1]] = those of a, ascending; starts: zeros, int64 [count + 2]."""
    for d in range(1, count + 1):
        for a in range(d, count + 1, d):
            starts[a + 1] += 1
    for a in range(1, count + 2):
        starts[a] += starts[a - 1]
    filled = starts.copy()
    for d in range(1, count + 1):
        for a in range(d, count + 1, d):
            divisors[filled[a]] = d
            filled[a] += 1


@kernel
def _row_of_nearest(a, xy_2N, gcd_N, gcd_weight, ulam_weight, first, last, block):
    """Into block: s(a, b) for b - 1 = first .. last - 1, as `similarity` has it: whole numbers are exact in float64."""
    x, y, number = xy_2N[0, a - 1], xy_2N[1, a - 1], f8(a)
    for j in range(last - first):
        i = np.uintp(first + j)
        dx, dy = xy_2N[0, i] - x, xy_2N[1, i] - y
        larger = max(number, f8(i4(i)) + 1.0)
        block[j] = gcd_weight * f8(gcd_N[i]) / larger + ulam_weight / (1.0 + np.sqrt(dx * dx + dy * dy))


@kernel
def _how_many_above(block, size, least):
    above = 0
    for j in range(size):
        above += block[j] > least
    return above


@kernel
def _nearest(from_a, to_a, xy_2N, starts, divisors, gcd_weight, ulam_weight, numbers_NK, similarities_NK):
    """The rows of the numbers from_a .. to_a - 1."""
    count, num_kept = numbers_NK.shape
    gcd_N, row_N = np.empty(count, np.int32), np.empty(count if num_kept > _FEW else _BLOCK)
    for a in range(from_a, to_a):
        _gcds_of_row(divisors[starts[a] : starts[a + 1]], gcd_N)
        kept, kept_s = numbers_NK[a - 1], similarities_NK[a - 1]
        if num_kept > _FEW:
            _row_of_nearest(a, xy_2N, gcd_N, gcd_weight, ulam_weight, 0, count, row_N)
            row_N[a - 1] = -np.inf
            order_N = np.argsort(-row_N, kind="mergesort")  # it leaves equal ones in their order
            for k in range(num_kept):
                kept[k], kept_s[k] = order_N[k] + 1, row_N[order_N[k]]
            continue
        kept_s[:] = -np.inf
        for first in range(0, count, _BLOCK):
            last = min(first + _BLOCK, count)
            _row_of_nearest(a, xy_2N, gcd_N, gcd_weight, ulam_weight, first, last, row_N)
            if first < a <= last:
                row_N[a - 1 - first] = -np.inf
            if _how_many_above(row_N, last - first, kept_s[num_kept - 1]) == 0:
                continue
            for j in range(last - first):
                s = row_N[j]
                if s > kept_s[num_kept - 1]:
                    k = num_kept - 1
                    while k > 0 and kept_s[k - 1] < s:
                        kept[k], kept_s[k] = kept[k - 1], kept_s[k - 1]
                        k -= 1
                    kept[k], kept_s[k] = first + j + 1, s


def nearest(
    count: int,
    neighbours: int,
    gcd_weight: float = GCD_WEIGHT,
    ulam_weight: float = ULAM_WEIGHT,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """Of every number 1 .. count the most similar others: numbers int32 [count, K], similarities float64 [count, K].

    The most similar first, of equally similar ones the smaller number first. Every pair is computed. `progress` is
    called with the rows done and their number. InputError for a count below 2, neighbours outside 1 .. count - 1, or
    a weight that is negative or no number.
    """
    _check(count, gcd_weight, ulam_weight)
    if count < 2:
        raise InputError("A vocabulary of 1 has no neighbours: the crystal needs at least 2 tokens.")
    if not 1 <= neighbours < count:
        raise InputError(f"{neighbours} neighbours of {count:,} tokens are not possible: give 1 to {count - 1:,}.")
    starts = np.zeros(count + 2, np.int64)
    num_divisors = sum(count // d for d in range(1, count + 1))
    divisors = np.empty(num_divisors, np.int32)
    _all_divisors(count, starts, divisors)
    xy_2N = np.ascontiguousarray(places(np.arange(1, count + 1)).T, np.float64)
    numbers_NK = np.empty((count, neighbours), np.int32)
    similarities_NK = np.empty((count, neighbours))
    for start in range(1, count + 1, _ROWS):
        end = min(start + _ROWS, count + 1)
        _nearest(
            start, end, xy_2N, starts, divisors, float(gcd_weight), float(ulam_weight), numbers_NK, similarities_NK
        )
        if progress is not None:
            progress(end - 1, count)
    return numbers_NK, similarities_NK


def _check(count: int, gcd_weight: float, ulam_weight: float) -> None:
    if not 1 <= count <= LARGEST_COUNT:
        raise InputError(f"A crystal of {count:,} numbers is not possible: give 1 to {LARGEST_COUNT:,}.")
    for name, weight in (("gcd", gcd_weight), ("ulam", ulam_weight)):
        if not 0 <= weight <= MAX_WEIGHT:
            raise InputError(f"The {name} weight is {weight}: give a number from 0 to {MAX_WEIGHT:,.0f}.")
