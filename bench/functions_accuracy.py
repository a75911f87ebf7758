"""An elementary function -> its largest error in ulp: of all 2**32 float32, or of samples of float64 and of pow.

float32 functions are compared with those of functions/double.py, which are measured beside them: an error of 2 ulp of
a float64 is 2**-28 ulp of a float32. Samples of float64 are spread over where a function does something, evenly and by
their logarithms, with bit patterns of all kinds among them; seeds follow from the block, so that a measurement can be
repeated.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from cllm_spheres_bench import functions_reference as R

from cllm_spheres.crystal.functions import elementwise as W
from cllm_spheres.crystal.functions.bits import bits_of_double, double_of_bits, float_of_bits, magnitude
from cllm_spheres.crystal.jit import kernel

BLOCK = {"float32": 1 << 17, "float64": 1 << 14}
# of float64: where samples lie; ("even", low, high), ("powers", low, high): +-2**(low .. high), ("patterns",): any bits
SPREADS: dict[str, tuple[tuple[Any, ...], ...]] = {
    "exp": (("even", -745, 710), ("even", -1, 1), ("powers", -60, 10)),
    "log": (("patterns",), ("even", 0, 3), ("even", 0.99, 1.01)),
    "tanh": (("even", -2, 2), ("even", -22, 22), ("powers", -1030, 6)),
    "sigmoid": (("even", -745, 40), ("even", -4, 4), ("powers", -60, 10)),
    "gelu": (("even", -22, 9), ("even", -2, 2), ("powers", -1030, 7)),
    "gelu_slope": (("even", -22, 9), ("even", -2, 2), ("powers", -60, 7)),
    "sqrt": (("patterns",), ("even", 0.25, 4)),
    "rsqrt": (("patterns",), ("even", 0.25, 4)),
    "sin": (("even", -100, 100), ("powers", -1030, 31), ("turns", 31), ("patterns",)),
    "erf": (("even", -6, 6), ("powers", -60, 3)),
    "cos": (("even", -100, 100), ("powers", -60, 31), ("turns", 31), ("patterns",)),
}
# gelu' crosses zero at -0.7525: around there the unit is at least that of 1/8
SLOPE_FLOOR, SLOPE_FROM, SLOPE_TO = 0.125, -1.3, -0.5


@dataclass
class Found:
    """The largest error so far."""

    ulp: float = 0.0
    at: list[float] | None = None
    wrong: int = 0  # NaN, infinities, zeros or signs that are not the reference's
    wrong_at: list[float] | None = None
    count: int = 0


@kernel
def errors(out_N, high_N, low_N, floor_N, digits, tiny, largest, error_N):
    """error_N = the error in ulp where result and reference are normal numbers, elsewhere -1; it vectorises.

    The reference is high * (1 + low), the unit that of the larger of it and floor.
    """
    scale = double_of_bits((digits + 1023) << 52)
    for i in range(out_N.size):
        out, high = np.float64(out_N[i]), high_N[i]
        size, other = magnitude(high), magnitude(out)
        unit = size if size > floor_N[i] else floor_N[i]
        unit = double_of_bits(bits_of_double(unit) & 0x7FF0000000000000)  # the power of two below it
        error = magnitude((out - high) / unit * scale - low_N[i] * (high / unit * scale))
        normal = (size >= tiny) & (other >= tiny) & (size <= largest) & (other <= largest)
        error_N[i] = error if normal else -1.0


@kernel
def wrong_ones(out_N, high_N, digits, tiny, largest, error_N):
    """(how many results that are no normal numbers are wrong, where the last one is, or -1)."""
    wrong, at = 0, -1
    for i in range(out_N.size):
        if error_N[i] >= 0.0:
            continue
        out, high = np.float64(out_N[i]), high_N[i]
        size, other = magnitude(high), magnitude(out)
        if high != high or out != out:
            bad = (high == high) != (out == out)
        elif size < tiny or other < tiny:
            # below the normal range zero of the same sign; an ulp from its border both are right
            bad = (bits_of_double(out) < 0) != (bits_of_double(high) < 0)
            bad = bad or (size >= tiny * (1.0 + 2.0 ** (2 - digits)))
            bad = bad or (other != 0.0 and size < tiny * (1.0 - 2.0**-digits))
        else:  # too large: an ulp from its border both are right
            bad = (out < 0) != (high < 0) or (size < largest * (1.0 - 2.0 ** (1 - digits))) or other < largest
        if bad:
            wrong += 1
            at = i
    return wrong, at


def compare(
    found: Found, out: np.ndarray, high: np.ndarray, low: np.ndarray, floor: np.ndarray, *x: np.ndarray
) -> None:
    """Add a block."""
    info = np.finfo(out.dtype)
    error = np.empty(out.size)
    limits = int(info.nmant), float(info.tiny), float(info.max)
    errors(out, high, low, floor, *limits, error)
    wrong, wrong_at = wrong_ones(out, high, *limits, error)
    at = int(error.argmax())
    if error[at] > found.ulp or found.at is None:
        found.ulp, found.at = max(0.0, float(error[at])), [float(a[at]) for a in x]
    if wrong:
        found.wrong += wrong
        found.wrong_at = [float(a[wrong_at]) for a in x]
    found.count += out.size


def merge(found: Found, other: Found) -> None:
    """Add what another process found."""
    if other.at is not None and (other.ulp > found.ulp or found.at is None):
        found.ulp, found.at = other.ulp, other.at
    found.wrong, found.wrong_at = found.wrong + other.wrong, found.wrong_at or other.wrong_at
    found.count += other.count


def _rng(name: str, block: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(name.encode()), block])


def sample(name: str, block: int, n: int) -> np.ndarray:
    """n float64 for a function of one argument."""
    rng, parts = _rng(name, block), []
    spreads = SPREADS[name]
    for i, (kind, *limits) in enumerate(spreads):
        count = n // len(spreads) if i else n - (len(spreads) - 1) * (n // len(spreads))
        if kind == "even":
            parts.append(rng.uniform(*limits, count))
        elif kind == "powers":
            parts.append(np.copysign(np.exp2(rng.uniform(*limits, count)), rng.random(count) - 0.5))
        elif kind == "turns":  # the float64 nearest to multiples of pi/2, up to 2**31
            parts.append(np.rint(2.0 ** rng.uniform(0, limits[0], count)) * (np.pi / 2))
        else:
            parts.append(rng.integers(0, 2**64, count, np.uint64).view(np.float64))
    return np.concatenate(parts)


def sample_pow(kind: Any, block: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Half: |x|**y within the range, with whole y where x < 0; a quarter near x = 1; a quarter any bits."""
    rng = _rng(f"pow {np.dtype(kind).name}", block)
    span = 100.0 if kind == np.float32 else 745.0
    word = np.uint32 if kind == np.float32 else np.uint64
    quarter = n // 4
    with np.errstate(all="ignore"):
        x = np.abs(rng.integers(0, np.iinfo(word).max, 2 * quarter, word, endpoint=True).view(kind))
        y = (rng.uniform(-span, span, x.size) / np.log(x)).astype(kind)
        turned = rng.random(x.size) < 0.25
        x, y = np.where(turned, -x, x), np.where(turned, np.rint(y), y)
        near = (1 + rng.uniform(-1, 1, quarter) * 2.0 ** rng.uniform(-23, 0, quarter)).astype(kind)
        steep = (rng.uniform(-span, span, quarter) / np.log(near)).astype(kind)
    rest = n - 3 * quarter
    any_x, any_y = (rng.integers(0, np.iinfo(word).max, rest, word, endpoint=True).view(kind) for _ in range(2))
    return np.concatenate([x, near, any_x]), np.concatenate([y, steep, any_y])


def blocks_of(kind: str, name: str, samples: int) -> int:
    """How many blocks a measurement has."""
    return 2**32 // BLOCK[kind] if kind == "float32" and name != "pow" else -(-samples // BLOCK[kind])


def add_block(found: Found, kind: str, name: str, block: int) -> None:
    """Compare one block of a function."""
    n, function = BLOCK[kind], getattr(W, name)
    if name == "pow":
        x, y = sample_pow(np.dtype(kind).type, block, n)
        out = W.pow(x, y)
        if kind == "float32":
            compare(found, out, W.pow(_wide(x), _wide(y)), np.zeros(n), np.zeros(n), x, y)
        else:
            compare(found, out, *R.pairs("pow", x, y), np.zeros(n), x, y)
        return
    if kind == "float32":
        x, wide = np.empty(n, np.float32), np.empty(n)
        patterns(block * n, x, wide)
        compare(found, function(x), function(wide), np.zeros(n), np.zeros(n), x)
        return
    if name == "erf":
        add_block_of_erf(found, block)
        return
    x = sample(name, block, n)
    floor = slope_floor(x) if name == "gelu_slope" else np.zeros(n)
    compare(found, function(x), *R.pairs(name, x), floor, x)


def add_block_of_erf(found: Found, block: int) -> None:
    """A block of erf: arguments around one centre of the reference's series; around zero, of all sizes too."""
    n, rng = BLOCK["float64"], _rng("erf", block)
    index = block % (round(R.ERF_END / R.ERF_STEP) + 1)
    x = index * R.ERF_STEP + rng.uniform(-0.5, 0.5, n) * R.ERF_STEP
    if index == 0:
        x[::2] = 2.0 ** rng.uniform(-1021, -5, n // 2) * rng.choice([-1, 1], n // 2)
    x = np.where(np.abs(x) < R.ERF_END, x, 8.0)
    if index * R.ERF_STEP < R.ERF_END:
        high, low = R.erf_near(x, index * R.ERF_STEP)
        low = np.divide(low, high, out=np.zeros(n), where=high != 0)
    else:
        high, low = R.pairs("erf", x)
    compare(found, W.erf(x), high, low, np.zeros(n), x)


def special_numbers(kind: Any) -> np.ndarray:
    """Zeros, infinities, NaN, subnormals, the borders of the range, whole and half numbers, and their negatives."""
    info = np.finfo(kind)
    with np.errstate(all="ignore"):
        positive = np.array(
            [0, 1, 2, 3, 0.5, 2.5, 7, 1e5, 1e6 + 0.5, info.tiny, info.max, info.smallest_subnormal, info.tiny / 2,
             np.inf, np.nan, 2.0**info.nmant, 2.0**info.nmant + 1, 2.0 ** (info.nmant + 1), 1 + info.eps,
             1 - info.eps / 2, info.maxexp, -info.minexp, np.pi, 2.0**30, 2.0**31, np.sqrt(2), np.sqrt(0.5)]
        ).astype(kind)  # fmt: skip
    return np.concatenate([positive, -positive])


def add_specials(found: Found, kind: str, name: str) -> None:
    """Compare at the special numbers; of pow at all pairs of them."""
    x = special_numbers(np.dtype(kind).type)
    floor = np.zeros(x.size)
    if name == "pow":
        x, y = (a.reshape(-1).copy() for a in np.meshgrid(x, x))
        wide = [_wide(a) for a in (x, y)]
        compare(found, W.pow(x, y), *R.pairs("pow", *wide), np.zeros(x.size), x, y)
        return
    if name == "gelu_slope":
        floor = slope_floor(x)
    compare(found, getattr(W, name)(x), *R.pairs(name, _wide(x)), floor, x)


def _wide(x: np.ndarray) -> np.ndarray:
    """float64, subnormals of x's own kind as zeros."""
    with np.errstate(all="ignore"):
        return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x).astype(np.float64)


def slope_floor(x: np.ndarray) -> np.ndarray:
    """The least unit of gelu' at x."""
    return np.where((x > SLOPE_FROM) & (x < SLOPE_TO), SLOPE_FLOOR, 0.0)


@kernel
def patterns(start, x_N, wide_N):
    """The float32 of the bits start, start + 1, ...; and as float64 with subnormals as zeros."""
    for i in range(x_N.size):
        x = float_of_bits(np.int32(np.uint32(start + i)))
        x_N[i] = x
        wide_N[i] = np.float64(x) if magnitude(x) >= np.float32(2.0**-126) or x != x else np.float64(x * np.float32(0))
