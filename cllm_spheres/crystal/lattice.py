"""A number -> its group of twelve, its place on the golden spiral; a vocabulary -> a row of features for every rank.

The number of a token is its rank + 1. Angles are counted in turns and reduced as whole numbers before any rounding;
sine and cosine are our own, so that no bit depends on the C library.
"""

# V vocabulary, C channels

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.crystal.primes import sieve
from cllm_spheres.errors import InputError

GROUPS = 12
# The golden angle in units of 2**-64 of a turn: 1 / phi**2 = (3 - sqrt 5) / 2, rounded.
GOLDEN = np.uint64((3 * 2**64 - math.isqrt(5 << 128)) // 2)
TWO_PI = 2 * math.pi
TWO_TO_MINUS_53 = 2.0**-53
_COSINES = tuple((-1.0) ** k / math.factorial(2 * k) for k in range(10))
_SINES = tuple((-1.0) ** k / math.factorial(2 * k + 1) for k in range(10))
_CONSTANT = 1e-9  # a column whose root mean square about its mean is below it has one value but for rounding

f8, i8, u8 = np.float64, np.int64, np.uint64


@kernel
def cosine_and_sine(turns):
    """cos and sin of 2 pi turns, float64, 0 <= turns <= 1; exact at quarters, else wrong by 3e-16 at most.

    The nearest quarter is taken off exactly; Taylor's series of what is left, at most an eighth of a turn.
    """
    quarter = i8(4.0 * turns + 0.5)
    x = TWO_PI * (turns - 0.25 * quarter)
    z = x * x
    cosine, sine = _COSINES[9], _SINES[9]
    for k in range(8, -1, -1):
        cosine = cosine * z + _COSINES[k]
        sine = sine * z + _SINES[k]
    sine *= x
    quarter &= i8(3)
    if quarter == 1:
        return -sine, cosine
    if quarter == 2:
        return -cosine, -sine
    if quarter == 3:
        return sine, -cosine
    return cosine, sine


@kernel
def group(n):
    """n mod 12, int64: the group of a number n >= 0."""
    return i8(n) % i8(GROUPS)


@kernel
def placement(i):
    """(x, y), float64, of i >= 0 on the golden spiral: radius sqrt(i), angle 2 pi i / phi**2.

    Each next number turns by the golden angle, the one that fractions approximate worst: the places crowd nowhere,
    one to every area of pi. Source: Vogel, A better way to construct the sunflower head (1979).
    """
    cosine, sine = cosine_and_sine(f8((u8(i) * GOLDEN) >> u8(11)) * TWO_TO_MINUS_53)
    radius = np.sqrt(f8(i))
    return radius * cosine, radius * sine


@kernel
def _golden_columns(x_V, y_V):
    for r in range(x_V.size):
        x_V[r], y_V[r] = placement(r + 1)


@kernel
def _periodic_columns(multiple, period, cosine_V, sine_V):
    """cos and sin of 2 pi multiple (r + 1) / period."""
    for r in range(cosine_V.size):
        phase = multiple * (r + 1) % period
        cosine_V[r], sine_V[r] = cosine_and_sine(f8(phase) / f8(period))


@kernel
def _centre(column_V, out_VC, channel):
    """The column less its mean over its root mean square, in float32; zeros where all are equal."""
    mean = 0.0
    for r in range(column_V.size):
        mean += column_V[r]
    mean /= column_V.size
    squares = 0.0
    for r in range(column_V.size):
        squares += (column_V[r] - mean) * (column_V[r] - mean)
    size = np.sqrt(squares / column_V.size)
    scale = 1.0 / size if size > _CONSTANT else 0.0
    for r in range(column_V.size):
        out_VC[r, channel] = np.float32((column_V[r] - mean) * scale)


@kernel
def _level(out_VC):
    """Every row to the norm sqrt(C); one of zeros becomes ones."""
    width = out_VC.shape[1]
    for r in range(out_VC.shape[0]):
        squares = 0.0
        for c in range(width):
            squares += f8(out_VC[r, c]) * f8(out_VC[r, c])
        scale = np.sqrt(width / squares) if squares > 0.0 else 0.0
        for c in range(width):
            out_VC[r, c] = np.float32(f8(out_VC[r, c]) * scale) if squares > 0.0 else np.float32(1)


def features(count: int, width: int) -> npt.NDArray[np.float32]:
    """The lattice's features, float32 [V, C]: row r is that of rank r. Its columns, as many as there is room for:

    2 of the golden spiral; 11 of the group: the cosine and sine of 2 pi k n / 12, k = 1 to 6, whose last sine is 0;
    then the cosine and sine of 2 pi k n / p, k = 1 to (p - 1) / 2, for p = 5, 7, 11, ... (2 and 3 the group has
    already): all that depends on n mod p alone. No two of the fractions k / p are near each other, so that the columns
    are independent; of first harmonics alone those of large primes would be nearly the same.

    Each is centred and brought to variance 1, and then each row to the norm sqrt(C), which moves the means a little.
    Rows of few channels may be equal. InputError for a count or a width below 1.
    """
    if not (1 <= count < 2**31 and width >= 1):
        raise InputError(
            f"A lattice of {count:,} tokens with {width:,} channels is not possible: give 1 of each or more."
        )
    out_VC = np.empty((count, width), np.float32)
    first_V, second_V = np.empty(count), np.empty(count)
    _golden_columns(first_V, second_V)
    _centre(first_V, out_VC, 0)
    if width > 1:
        _centre(second_V, out_VC, 1)
    channel = 2
    for multiple, period in _periods(width):
        _periodic_columns(multiple, period, first_V, second_V)
        _centre(first_V, out_VC, channel)
        channel += 1
        if channel < width and 2 * multiple != period:
            _centre(second_V, out_VC, channel)
            channel += 1
    _level(out_VC)
    return out_VC


def _periods(width: int) -> list[tuple[int, int]]:
    """(multiple, period) of each pair of columns behind the golden ones; of the last the sine may have no room."""
    rest = width - 2
    wanted = max(0, (rest + (1 if rest < GROUPS - 1 else 2)) // 2)
    pairs = [(k, GROUPS) for k in range(1, GROUPS // 2 + 1)]
    for p in sieve(max(100, width))[2:].tolist():  # the primes up to x have about x**2 / (4 log x) pairs
        if len(pairs) >= wanted:
            break
        pairs += [(k, p) for k in range(1, (p - 1) // 2 + 1)]
    return pairs[:wanted]
