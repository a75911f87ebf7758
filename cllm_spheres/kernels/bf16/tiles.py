"""Rows of float32 <-> bfloat16 in tiles of 1 KB, the form in which the products take them.

A tile is 16 lines of 64 bytes, a cache line each. A matrix X[N, C] is padded with zeros to multiples of 32 and has
four forms, all of the same size; a form is a grid of tiles, the last index running fastest:

    rows       [N/16][C/32]  a line is a row's 32 channels           left operand of X @ ...
    flipped    [N/16][C/32]  a line is two channels of 16 rows       right operand of ... @ X.T
    pairs      [C/16][N/32]  a line is 16 channels of two rows       right operand of ... @ X
    columns    [C/16][N/32]  a line is a channel's 32 rows           left operand of X.T @ ...

"flipped" is "rows" and "columns" is "pairs" with the 16 x 16 words of each tile transposed.
Rounding is to nearest, ties to even; subnormals become zero; NaN stays NaN.
"""

from __future__ import annotations

import llvmlite.ir as ir
from numba import types

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.crystal.lanes import (
    FLOATS,
    WORDS,
    Lanes,
    constant,
    each,
    first_lanes,
    function,
    load,
    place,
    spread,
    store,
    vectorised,
)

TILE = 1024  # bytes
LINE = 64

_i16, _i32 = ir.IntType(16), ir.IntType(32)
_words32 = ir.VectorType(_i16, 32)
_int64, _float32 = types.int64, types.float32


class BFloat(ir.types.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


_bfloat32 = ir.VectorType(BFloat(), 32)


def _load(b, address, offset, vector):
    """A vector at address + offset bytes."""
    pointer = b.inttoptr(b.add(address, offset), vector.as_pointer())
    return b.load(pointer, align=4)


def _store(b, value, address, offset, align=4):
    b.store(value, b.inttoptr(b.add(address, offset), value.type.as_pointer()), align=align)


def _shuffle(b, low, high, mask):
    return b.shuffle_vector(low, high, ir.Constant(ir.VectorType(_i32, len(mask)), mask))


def _line(b, halves):
    """Two times 16 float32 -> 32 bfloat16, as words."""
    convert = function(b, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", _bfloat32, [FLOATS, FLOATS])
    return b.bitcast(b.call(convert, [halves[1].value, halves[0].value]), _words32)


def _widened(b, words):
    """The words of a line -> two times 16 float32."""
    sixteen = ir.Constant(WORDS, [16] * 16)
    parts = (_shuffle(b, words, words, list(range(16 * half, 16 * half + 16))) for half in range(2))
    return [Lanes(b, b.bitcast(b.shl(b.zext(part, WORDS), sixteen), FLOATS)) for part in parts]


def store_line(b, halves, address, offset):
    """Two times 16 float32 -> a line of 32 bfloat16 at address + offset bytes."""
    _store(b, _line(b, halves), address, offset)


def load_line(b, address, offset):
    """A line -> two times 16 float32."""
    return _widened(b, _load(b, address, offset, _words32))


def rounded(b, halves):
    """Two times 16 float32 as they are once they have been in a line."""
    return _widened(b, _line(b, halves))


@vectorised(*[_int64] * 4)
def round_row(b, row, line, groups, step):
    """A line for each of `groups` groups of 32 float32 at `row`, `step` bytes from one to the next."""
    with each(b, groups) as loop:
        at = b.mul(loop.index, constant(128))
        halves = [load(b, row, at), load(b, row, b.add(at, constant(64)))]
        store_line(b, halves, line, b.mul(loop.index, step))


@vectorised(_float32, _int64)
def round_one(b, number, address):
    """One bfloat16 at an address, rounded as in a line."""
    wide = spread(b, number)
    words = _line(b, [wide, wide])
    _store(b, b.extract_element(words, ir.Constant(_i32, 0)), address, constant(0), align=2)


@vectorised(*[_int64] * 3)
def round_part(b, source, line, count):
    """One line from `count` <= 32 float32; the rest of it is zero. Nothing beyond them is read."""
    mask_type = ir.VectorType(ir.IntType(1), 16)
    masked = function(b, "llvm.masked.load.v16f32.p0", FLOATS, [FLOATS.as_pointer(), _i32, mask_type, FLOATS])
    halves = []
    for half in range(2):
        pointer, mask = place(b, source, 64 * half, FLOATS), first_lanes(b, count, 16 * half)
        value = b.call(masked, [pointer, ir.Constant(_i32, 4), mask, ir.Constant(FLOATS, [0.0] * 16)])
        halves.append(Lanes(b, value))
    store_line(b, halves, line, constant(0))


@vectorised(*[_int64] * 4)
def widen_row(b, line, row, groups, step):
    """The opposite of round_row: 32 float32 at `row` from each line."""
    with each(b, groups) as loop:
        at = b.mul(loop.index, constant(128))
        low, high = load_line(b, line, b.mul(loop.index, step))
        store(low, row, at)
        store(high, row, b.add(at, constant(64)))


_PAIRS = [[x for i in range(16) for x in (16 * half + i, 32 + 16 * half + i)] for half in range(2)]


def _interleaved(b, upper, lower, pair):
    """Lines 2 * pair and 2 * pair + 1 of two tiles, one below the other -> a line of each of the tiles in pairs."""
    tile, row = (upper, 2 * pair) if pair < 8 else (lower, 2 * pair - 16)
    first, second = (_load(b, tile, constant(LINE * (row + i)), _words32) for i in range(2))
    return [b.bitcast(_shuffle(b, first, second, mask), WORDS) for mask in _PAIRS]


def _transposed(b, lines):
    """16 vectors of 16 words, transposed: four rounds, each exchanging blocks of 1, 2, 4, then 8 words."""
    for size in (1, 2, 4, 8):
        low = [i if not i & size else 16 + i - size for i in range(16)]
        high = [i + size if not i & size else 16 + i for i in range(16)]
        result = list(lines)
        for i in range(16):
            if not i & size:
                result[i] = _shuffle(b, lines[i], lines[i + size], low)
                result[i + size] = _shuffle(b, lines[i], lines[i + size], high)
        lines = result
    return lines


@vectorised(_int64, _int64)
def flip_tile(b, source, target):
    """The 16 x 16 words of a tile transposed: rows -> flipped, pairs -> columns, and back."""
    lines = [_load(b, source, constant(LINE * i), WORDS) for i in range(16)]
    for i, line in enumerate(_transposed(b, lines)):
        _store(b, line, target, constant(LINE * i))


@vectorised(*[_int64] * 4)
def pair_block(b, upper, lower, first, second):
    """Two tiles in rows, one below the other: 32 rows of 32 channels -> two tiles in pairs, 16 channels each."""
    for pair in range(16):
        for target, line in zip((first, second), _interleaved(b, upper, lower, pair), strict=True):
            _store(b, line, target, constant(LINE * pair))


@kernel
def padded(n):
    """n raised to a multiple of 32."""
    return (n + 31) // 32 * 32


@kernel
def padded_groups(size, group):
    """A size that comes in groups, each padded to a multiple of 32."""
    return size // group * padded(group)


@kernel
def line_of(form, row, columns):
    """Address of a row's first line in rows; the next 32 channels follow at + TILE. columns: padded."""
    return form + (row // 16) * (columns // 32) * TILE + (row % 16) * LINE


@kernel
def pairs_of(rows_form, pairs_form, n, c):
    """pairs from rows; n, c: padded sizes."""
    across, down = c // 32, n // 32
    for i in range(down):
        for j in range(across):
            upper = rows_form + (2 * i * across + j) * TILE
            target = pairs_form + (2 * j * down + i) * TILE
            pair_block(upper, upper + across * TILE, target, target + down * TILE)


@kernel
def flip(form, flipped, tiles):
    """flipped from rows, columns from pairs; `tiles` of them, in place where both are the same."""
    for i in range(tiles):
        flip_tile(form + i * TILE, flipped + i * TILE)


@kernel
def columns_of(rows_form, columns_form, n, c):
    """columns from rows; n, c: padded sizes."""
    pairs_of(rows_form, columns_form, n, c)
    flip(columns_form, columns_form, (n // 32) * (c // 16))


@vectorised(_int64)
def transpose_block(b, address):
    """float32[32, 32] transposed in place."""

    def corner(row, column):
        offsets = [constant(128 * (row + i) + 4 * column) for i in range(16)]
        return offsets, _transposed(b, [_load(b, address, offset, WORDS) for offset in offsets])

    def put(offsets, lines):
        for offset, line in zip(offsets, lines, strict=True):
            _store(b, line, address, offset)

    for at in (0, 16):
        put(*corner(at, at))
    upper, lower = corner(0, 16), corner(16, 0)
    put(upper[0], lower[1])
    put(lower[0], upper[1])
