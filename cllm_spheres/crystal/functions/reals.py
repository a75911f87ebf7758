"""Real constants to many bits, as fractions, and as sums of float64 for reductions that must not lose any."""

from __future__ import annotations

import math
from fractions import Fraction


def parts(value: Fraction, count: int) -> tuple[float, ...]:
    """A real number as a sum of float64: the nearest, the one nearest to the rest, and so on."""
    found = []
    for _ in range(count):
        found.append(float(value))  # of a Fraction, rounded correctly
        value -= Fraction(found[-1])
    return tuple(found)


def pi(bits: int = 1400) -> Fraction:
    """Pi to `bits` bits. Source: Machin, 16 arctan(1/5) - 4 arctan(1/239)."""
    one = 1 << (bits + 32)

    def arctan(n: int) -> int:
        term = total = one // n
        k = 1
        while term:
            term //= -n * n
            k += 2
            total += term // k
        return total

    return Fraction(16 * arctan(5) - 4 * arctan(239), one)


def ln2(bits: int = 300) -> Fraction:
    """ln 2 to `bits` bits: the sum of 1 / (k 2**k)."""
    one = 1 << (bits + 32)
    return Fraction(sum((one >> k) // k for k in range(1, bits + 32)), one)


def root(value: Fraction, bits: int = 300) -> Fraction:
    """The square root to `bits` bits after the point."""
    return Fraction(math.isqrt((value.numerator << (2 * bits)) // value.denominator), 1 << bits)
