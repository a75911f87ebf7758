"""A number -> where it stands on Ulam's spiral, and back; exact for every int64 from 1 on.

1 is at the origin, 2 to its right, and the spiral turns left: up, to the left, down, to the right.

    17 16 15 14 13
    18  5  4  3 12
    19  6  1  2 11
    20  7  8  9 10
    21 22 23 24 25

Ring r holds the 8 r numbers from (2r - 1)**2 + 1 to (2r + 1)**2; x grows to the right, y upwards.
"""

# N numbers

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.errors import InputError

LARGEST = 2**63 - 1
LAST_RING = 1518500250  # the ring of LARGEST: it breaks off on its second side

i8, u8 = np.int64, np.uint64


@kernel
def isqrt(n):
    """The largest whole k with k * k <= n, int64, exact for 0 <= n < 2**63.

    The root of the rounded n may be one too large or too small, never more; n - k * k cannot overflow.
    """
    k = i8(np.sqrt(np.float64(n)))
    if k * k > n:
        k -= i8(1)
    if n - k * k > k + k:
        k += i8(1)
    return k


@kernel
def place(n):
    """(x, y), int64, of a number n >= 1."""
    before = i8(n) - i8(1)
    r = (isqrt(before) + i8(1)) // i8(2)
    if r == 0:
        return i8(0), i8(0)
    offset = before - (r + r - i8(1)) * (r + r - i8(1))  # 0 to 8 r - 1
    side = offset // (r + r)
    along = offset - side * (r + r) + i8(1)  # 1 to 2 r
    if side == 0:
        return r, along - r
    if side == 1:
        return r - along, r
    if side == 2:
        return -r, r - along
    return along - r, -r


@kernel
def number(x, y):
    """The number at (x, y), int64: what `place` undoes. Where it is above 2**63 - 1 it wraps to a negative one."""
    x, y = i8(x), i8(y)
    r = max(abs(x), abs(y))
    if r == 0:
        return i8(1)
    if y == -r:
        offset = i8(6) * r + x + r
    elif x == r:
        offset = y + r
    elif y == r:
        offset = i8(2) * r + r - x
    else:
        offset = i8(4) * r + r - y
    inner = u8(r + r - i8(1))
    return i8(inner * inner + u8(offset))


@kernel
def _places(n_N, xy_N2):
    for i in range(n_N.size):
        xy_N2[i, 0], xy_N2[i, 1] = place(n_N[i])


@kernel
def _numbers(xy_N2, n_N):
    for i in range(n_N.size):
        n_N[i] = number(xy_N2[i, 0], xy_N2[i, 1])


def places(n_N: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Where numbers stand, int64 [N, 2]. InputError for one below 1, or none that fits an int64."""
    n_N = _whole(n_N, "numbers of the spiral")
    if n_N.ndim != 1:
        raise InputError(f"The numbers have the shape {n_N.shape}: give one dimension, [N].")
    if n_N.size and n_N.min() < 1:
        raise InputError(f"{n_N.min()} is not on Ulam's spiral: its numbers begin at 1.")
    xy_N2 = np.empty((n_N.size, 2), np.int64)
    _places(n_N, xy_N2)
    return xy_N2


def numbers(xy_N2: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """The numbers at places, int64 [N]. InputError for a place whose number is above 2**63 - 1."""
    xy_N2 = _whole(xy_N2, "places on the spiral")
    if xy_N2.ndim != 2 or xy_N2.shape[1] != 2:
        raise InputError(f"The places have the shape {xy_N2.shape}: give [N, 2].")
    known = ((xy_N2 >= -LAST_RING) & (xy_N2 <= LAST_RING)).all(1)
    n_N = np.empty(len(xy_N2), np.int64)
    _numbers(np.where(known[:, None], xy_N2, 0), n_N)
    known &= n_N > 0
    if not known.all():
        x, y = xy_N2[np.argmin(known)]
        raise InputError(f"The number at ({x}, {y}) is above 2**63 - 1, the largest that is known here.")
    return n_N


def _whole(values: npt.ArrayLike, what: str) -> npt.NDArray[np.int64]:
    """The values as a contiguous int64 array."""
    array = np.asarray(values)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype == object and all(isinstance(value, int) for value in array.flat):
        raise InputError(f"The {what} must fit 64 bits with sign: -2**63 to 2**63 - 1.")
    if array.dtype.kind not in "iu":
        raise InputError(f"The {what} must be whole numbers, not {array.dtype}.")
    if array.dtype == np.uint64 and array.size and array.max() > LARGEST:
        raise InputError(f"{array.max()} is too large: the {what} end at 2**63 - 1.")
    return np.ascontiguousarray(array, np.int64)
