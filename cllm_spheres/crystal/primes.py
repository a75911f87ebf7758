"""Whole numbers -> primes, factors and greatest common divisors, all exact.

Python's own integers where a number is asked for once, jitted code where there are many.
"""

# N, M numbers

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import intrinsic

from cllm_spheres.crystal.gcd_lanes import GROUP, gcd_rows
from cllm_spheres.crystal.jit import kernel
from cllm_spheres.crystal.ulam import isqrt
from cllm_spheres.errors import InputError

LARGEST = 2**63 - 1
SIEVE_LIMIT = 2**32  # the primes below it take 1.6 GB, and as much again while they are found
_SEGMENT = 1 << 18  # odd numbers looked at together: they fit a core's cache
_SMALL = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)

i8, u8 = np.int64, np.uint64


@intrinsic
def trailing_zeros(typing_context, x):
    """How many zeros end the bits of a uint64 that is not 0."""
    return types.uint64(types.uint64), lambda c, b, s, a: b.cttz(a[0], c.get_constant(types.boolean, True))


@kernel
def gcd(a, b):
    """The greatest common divisor of two int64 >= 0, int64; gcd(0, b) = b.

    Halves what is even and subtracts the smaller from the larger, odd both, until they are equal.
    Source: Stein, Computational problems associated with Racah algebra (1967).
    """
    x, y = u8(a), u8(b)
    if x == u8(0) or y == u8(0):
        return i8(x | y)
    twos = trailing_zeros(x | y)
    x >>= trailing_zeros(x)
    y >>= trailing_zeros(y)
    while x != y:
        smaller = min(x, y)
        difference = max(x, y) - smaller
        x, y = smaller, difference >> trailing_zeros(difference)
    return i8(x << twos)


def gcd_matrix(a_N: npt.ArrayLike, b_M: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """The greatest common divisors of every a with every b, int64 [N, M]; all numbers from 0 to 2**63 - 1.

    Many pairs of numbers at a time, in lanes as wide as the largest number needs. InputError for others.
    """
    a_N, b_M = _counting(a_N), _counting(b_M)
    largest = max(int(a_N.max(initial=0)), int(b_M.max(initial=0)))
    narrow = np.uint16 if largest < 2**16 else np.uint32 if largest < 2**32 else np.uint64
    padded_M = np.zeros(-(-b_M.size // GROUP) * GROUP, narrow)
    padded_M[: b_M.size] = b_M
    out_NM = np.empty((a_N.size, b_M.size), np.int64)
    gcd_rows(a_N, padded_M, np.empty_like(padded_M), out_NM)
    return out_NM


def _counting(values: npt.ArrayLike) -> npt.NDArray[np.int64]:
    array = np.asarray(values)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(f"gcd_matrix takes two lists of whole numbers, not {array.dtype} of shape {array.shape}.")
    if array.size and not 0 <= array.min() <= array.max() <= LARGEST:
        raise InputError(f"gcd_matrix takes 0 to 2**63 - 1, not {array.min()} to {array.max()}.")
    return array.astype(np.int64)


@kernel
def _sieve(limit, base, out):
    """The odd primes up to `limit` into `out` behind its first; how many there are with the 2. base: primes <= root."""
    found = 1
    is_prime = np.empty(_SEGMENT, np.uint8)
    start = i8(3)
    while start <= limit:
        size = min(i8(_SEGMENT), (limit - start) // 2 + 1)
        is_prime[:size] = 1
        for k in range(1, base.size):
            p = base[k]
            first = max(p * p, (start + p - 1) // p * p)
            first += p if first % 2 == 0 else i8(0)
            for j in range((first - start) // 2, size, p):
                is_prime[j] = 0
        for j in range(size):
            if is_prime[j]:
                out[found] = start + 2 * j
                found += 1
        start += 2 * i8(_SEGMENT)
    return found


def sieve(limit: int) -> npt.NDArray[np.int64]:
    """The primes up to `limit`, int64, ascending: Eratosthenes over odd numbers, a segment at a time.

    InputError above 2**32.
    """
    if limit > SIEVE_LIMIT:
        raise InputError(f"The primes up to {limit:,} are too many to hold: sieve ends at {SIEVE_LIMIT:,}.")
    if limit < 2:
        return np.zeros(0, np.int64)
    base = sieve(int(isqrt(limit))) if limit >= 9 else np.array([2], np.int64)
    # pi(x) < 1.25506 x / log x for x > 1. Source: Rosser and Schoenfeld (1962).
    out = np.empty(int(1.2551 * limit / math.log(limit)) + 2, np.int64)
    out[0] = 2
    return out[: _sieve(limit, base, out)].copy()


def is_prime(n: int) -> bool:
    """Whether n is prime, for n < 2**63: Miller and Rabin's test to twelve bases, which is a proof below 3.1e23.

    Source: Sorenson and Webster, Strong pseudoprimes to twelve prime bases (2015).
    """
    if n < 2 or any(n % p == 0 for p in _SMALL):
        return n in _SMALL
    twos = ((n - 1) & -(n - 1)).bit_length() - 1
    odd = (n - 1) >> twos
    return all(_is_strong_probable_prime(n, base, odd, twos) for base in _SMALL)


def _is_strong_probable_prime(n: int, base: int, odd: int, twos: int) -> bool:
    x = pow(base, odd, n)
    if x in (1, n - 1):
        return True
    for _ in range(twos - 1):
        x = x * x % n
        if x == n - 1:
            return True
    return False


def factorise(n: int) -> list[tuple[int, int]]:
    """(prime, exponent) of each prime factor of n, ascending; [] for 1. InputError outside 1 to 2**63 - 1."""
    if not 1 <= n <= LARGEST:
        raise InputError(f"Cannot factorise {n}: give a number from 1 to 2**63 - 1.")
    factors: dict[int, int] = {}
    parts = []
    for p in _SMALL:
        while n % p == 0:
            n //= p
            factors[p] = factors.get(p, 0) + 1
    if n > 1:
        parts.append(n)
    while parts:
        part = parts.pop()
        if is_prime(part):
            factors[part] = factors.get(part, 0) + 1
        else:
            factor = _a_factor(part)
            parts += [factor, part // factor]
    return sorted(factors.items())


def _a_factor(n: int) -> int:
    """A factor of an odd composite n, neither 1 nor n: Pollard's rho, differences multiplied 128 at a time.

    The sequences are tried in a fixed order, so that the work is the same each time.
    Source: Brent, An improved Monte Carlo factorization algorithm (1980).
    """
    root = math.isqrt(n)
    if root * root == n:
        return root
    for c in range(1, n):
        y, factor, product, power = 2, 1, 1, 1
        while factor == 1:
            x = y
            for _ in range(power):
                y = (y * y + c) % n
            done = 0
            while done < power and factor == 1:
                before = y
                for _ in range(min(128, power - done)):
                    y = (y * y + c) % n
                    product = product * abs(x - y) % n
                factor = math.gcd(product, n)
                done += 128
            power *= 2
        if factor == n:  # several factors at once, or the cycle closed: those 128 one by one
            factor, y = 1, before
            while factor == 1:
                y = (y * y + c) % n
                factor = math.gcd(abs(x - y), n)
        if factor != n:
            return factor
    raise AssertionError(f"no factor of {n} was found")
