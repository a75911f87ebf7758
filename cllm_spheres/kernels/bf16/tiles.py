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
from numba.core import cgutils
from numba.extending import intrinsic

from cllm_spheres.crystal.jit import kernel

TILE = 1024  # bytes
LINE = 64
SIDE = 32  # all sizes are padded to it

_i8, _i16, _i32, _i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_float16 = ir.VectorType(ir.FloatType(), 16)
_words16, _words32 = ir.VectorType(_i32, 16), ir.VectorType(_i16, 32)


class BFloat(ir.types.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"


_bfloat32 = ir.VectorType(BFloat(), 32)


def _function(b, name, result, arguments):
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(result, arguments), name)


def _constant(value):
    return ir.Constant(_i64, value)


def _load(b, address, offset, vector):
    """A vector at address + offset bytes."""
    pointer = b.inttoptr(b.add(address, offset), vector.as_pointer())
    return b.load(pointer, align=4)


def _store(b, value, address, offset):
    b.store(value, b.inttoptr(b.add(address, offset), value.type.as_pointer()), align=4)


def _shuffle(b, low, high, mask):
    return b.shuffle_vector(low, high, ir.Constant(ir.VectorType(_i32, len(mask)), mask))


def _loop(b, count):
    return cgutils.for_range(b, count, intp=_i64)


@intrinsic
def round_row(typing_context, row, line, groups, step):
    """A line for each of `groups` groups of 32 float32 at `row`, `step` bytes from one to the next."""

    def generate(context, b, signature, arguments):
        source, target, count, step = arguments
        convert = _function(b, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", _bfloat32, [_float16, _float16])
        with _loop(b, count) as loop:
            at = b.mul(loop.index, _constant(128))
            low, high = (_load(b, source, b.add(at, _constant(offset)), _float16) for offset in (0, 64))
            _store(b, b.bitcast(b.call(convert, [high, low]), _words32), target, b.mul(loop.index, step))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def round_part(typing_context, source, line, count):
    """One line from `count` <= 32 float32; the rest of it is zero. Nothing beyond them is read."""

    def generate(context, b, signature, arguments):
        source, target, count = arguments
        mask_type = ir.VectorType(ir.IntType(1), 16)
        load = _function(
            b, "llvm.masked.load.v16f32.p0", _float16, [_float16.as_pointer(), _i32, mask_type, _float16]
        )
        convert = _function(b, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", _bfloat32, [_float16, _float16])
        wanted = b.trunc(count, _i32)
        halves = []
        for half in range(2):
            lanes = ir.Constant(_words16, [16 * half + i for i in range(16)])
            one = b.insert_element(ir.Constant(_words16, ir.Undefined), wanted, ir.Constant(_i32, 0))
            mask = b.icmp_signed("<", lanes, _shuffle(b, one, one, [0] * 16))
            pointer = b.inttoptr(b.add(source, _constant(64 * half)), _float16.as_pointer())
            halves.append(b.call(load, [pointer, ir.Constant(_i32, 4), mask, ir.Constant(_float16, [0.0] * 16)]))
        _store(b, b.bitcast(b.call(convert, [halves[1], halves[0]]), _words32), target, _constant(0))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@intrinsic
def widen_row(typing_context, line, row, groups, step):
    """The opposite of round_row: 32 float32 at `row` from each line."""

    def generate(context, b, signature, arguments):
        source, target, count, step = arguments
        sixteen = ir.Constant(_words16, [16] * 16)
        with _loop(b, count) as loop:
            words = _load(b, source, b.mul(loop.index, step), _words32)
            at = b.mul(loop.index, _constant(128))
            for half in range(2):
                part = _shuffle(b, words, words, list(range(16 * half, 16 * half + 16)))
                value = b.bitcast(b.shl(b.zext(part, _words16), sixteen), _float16)
                _store(b, value, target, b.add(at, _constant(64 * half)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


_PAIRS = [[x for i in range(16) for x in (16 * half + i, 32 + 16 * half + i)] for half in range(2)]


def _interleaved(b, upper, lower, pair):
    """Lines 2 * pair and 2 * pair + 1 of two tiles, one below the other -> a line of each of the tiles in pairs."""
    tile, row = (upper, 2 * pair) if pair < 8 else (lower, 2 * pair - 16)
    first, second = (_load(b, tile, _constant(LINE * (row + i)), _words32) for i in range(2))
    return [b.bitcast(_shuffle(b, first, second, mask), _words16) for mask in _PAIRS]


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


@intrinsic
def flip_tile(typing_context, source, target):
    """The 16 x 16 words of a tile transposed: rows -> flipped, pairs -> columns, and back."""

    def generate(context, b, signature, arguments):
        lines = [_load(b, arguments[0], _constant(LINE * i), _words16) for i in range(16)]
        for i, line in enumerate(_transposed(b, lines)):
            _store(b, line, arguments[1], _constant(LINE * i))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def pair_block(typing_context, upper, lower, first, second):
    """Two tiles in rows, one below the other: 32 rows of 32 channels -> two tiles in pairs, 16 channels each."""

    def generate(context, b, signature, arguments):
        upper, lower, *targets = arguments
        for pair in range(16):
            for target, line in zip(targets, _interleaved(b, upper, lower, pair), strict=True):
                _store(b, line, target, _constant(LINE * pair))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@kernel
def padded(n):
    """n raised to a multiple of 32."""
    return (n + 31) // 32 * 32


@kernel
def form_bytes(rows, columns):
    """Bytes of any form of a matrix."""
    return padded(rows) * padded(columns) * 2


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


@intrinsic
def transpose_block(typing_context, address):
    """float32[32, 32] transposed in place."""

    def generate(context, b, signature, arguments):
        (base,) = arguments

        def corner(row, column):
            offsets = [_constant(128 * (row + i) + 4 * column) for i in range(16)]
            return offsets, _transposed(b, [_load(b, base, offset, _words16) for offset in offsets])

        def put(offsets, lines):
            for offset, line in zip(offsets, lines, strict=True):
                _store(b, line, base, offset)

        for at in (0, 16):
            put(*corner(at, at))
        upper, lower = corner(0, 16), corner(16, 0)
        put(upper[0], lower[1])
        put(lower[0], upper[1])
        return context.get_dummy_value()

    return types.void(types.int64), generate
