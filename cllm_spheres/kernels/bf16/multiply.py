"""Products of bfloat16 tiles, accumulated in float32: blocks of 32 x 32 on AMX, or by AVX-512's dot products.

An element of a product is one chain of sums over the inner index in ascending order, whatever the order in which
the blocks are computed: the loops around a block may be arranged by the sizes of caches without changing bits.
"""

from __future__ import annotations

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cllm_spheres.crystal.cpu import bf16_backend
from cllm_spheres.crystal.jit import kernel
from cllm_spheres.crystal.lanes import FLOATS, WORDS, constant, function
from cllm_spheres.kernels.arrays import floats, integers
from cllm_spheres.kernels.bf16.tiles import TILE, BFloat

_i8, _i64 = ir.IntType(8), ir.IntType(64)
_address = _i8.as_pointer()
B_BYTES = 1 << 20  # of the right operand at a time: half of a core's L2


@intrinsic
def _load_tile_configuration(typing_context, address):
    def generate(context, b, signature, arguments):
        b.call(function(b, "llvm.x86.ldtilecfg", ir.VoidType(), [_address]), [b.inttoptr(arguments[0], _address)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _release_tiles(typing_context):
    def generate(context, b, signature, arguments):
        b.call(function(b, "llvm.x86.tilerelease", ir.VoidType(), []), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _amx_block(typing_context, count, a, a_step, b, b_step, c, c_step, accumulate):
    """c[32, 32] (+)= a @ b over `count` pairs of tiles.

    a, b: the first tile of 16 rows, or of 16 columns; those of the next 16 lie `step` bytes on, the next inner index
    one tile on. c: float32, `c_step` bytes from row to row.
    """

    def generate(context, bl, signature, arguments):
        count, a, a_step, b, b_step, c, c_step, accumulate = arguments
        tile = lambda n: ir.Constant(_i8, n)  # noqa: E731
        at = lambda address: bl.inttoptr(address, _address)  # noqa: E731
        load = function(bl, "llvm.x86.tileloadd64", ir.VoidType(), [_i8, _address, _i64])
        save = function(bl, "llvm.x86.tilestored64", ir.VoidType(), [_i8, _address, _i64])
        multiply = function(bl, "llvm.x86.tdpbf16ps", ir.VoidType(), [_i8, _i8, _i8])
        zero = function(bl, "llvm.x86.tilezero", ir.VoidType(), [_i8])
        below = bl.add(c, bl.mul(c_step, constant(16)))
        corners = [c, bl.add(c, constant(64)), below, bl.add(below, constant(64))]
        with bl.if_else(bl.icmp_signed("!=", accumulate, constant(0))) as (then, otherwise):
            with then:
                for i, corner in enumerate(corners):
                    bl.call(load, [tile(i), at(corner), c_step])
            with otherwise:
                for i in range(4):
                    bl.call(zero, [tile(i)])
        with cgutils.for_range(bl, count, intp=_i64) as loop:
            offset = bl.mul(loop.index, constant(TILE))
            left, right = bl.add(a, offset), bl.add(b, offset)
            line = constant(64)
            bl.call(load, [tile(4), at(left), line])
            bl.call(load, [tile(6), at(right), line])
            bl.call(load, [tile(7), at(bl.add(right, b_step)), line])
            bl.call(load, [tile(5), at(bl.add(left, a_step)), line])
            for target, x, y in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)):
                bl.call(multiply, [tile(target), tile(x), tile(y)])
        for i, corner in enumerate(corners):
            bl.call(save, [tile(i), at(corner), c_step])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


@intrinsic
def _avx_block(typing_context, count, a, a_step, b, b_step, c, c_step, accumulate):
    """As _amx_block, by AVX512-BF16: eight rows of two vectors at a time."""

    def generate(context, bl, signature, arguments):
        count, a, a_step, b, b_step, c, c_step, accumulate = arguments
        bfloats = ir.VectorType(BFloat(), 32)
        i32 = ir.IntType(32)
        dot = function(bl, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, [FLOATS, bfloats, bfloats])
        at = lambda address, kind: bl.inttoptr(address, kind.as_pointer())  # noqa: E731
        for first in range(0, 32, 8):
            sums = [[cgutils.alloca_once(bl, FLOATS) for _ in range(2)] for _ in range(8)]
            rows = [bl.add(c, bl.mul(c_step, constant(first + i))) for i in range(8)]
            with bl.if_else(bl.icmp_signed("!=", accumulate, constant(0))) as (then, otherwise):
                with then:
                    for row, pair in zip(rows, sums, strict=True):
                        for j, place in enumerate(pair):
                            old = bl.load(at(bl.add(row, constant(64 * j)), FLOATS), align=4)
                            bl.store(old, place)
                with otherwise:
                    for pair in sums:
                        for place in pair:
                            bl.store(ir.Constant(FLOATS, [0.0] * 16), place)
            left = a if first < 16 else bl.add(a, a_step)
            left = bl.add(left, constant(64 * (first % 16)))
            with cgutils.for_range(bl, count, intp=_i64) as outer:
                tile = bl.mul(outer.index, constant(TILE))
                with cgutils.for_range(bl, constant(16), intp=_i64) as inner:
                    line = bl.add(bl.add(b, tile), bl.mul(inner.index, constant(64)))
                    right = [bl.load(at(x, bfloats), align=4) for x in (line, bl.add(line, b_step))]
                    pair_at = bl.add(bl.add(left, tile), bl.mul(inner.index, constant(4)))
                    for i in range(8):
                        word = bl.load(at(bl.add(pair_at, constant(64 * i)), i32), align=4)
                        one = bl.insert_element(ir.Constant(WORDS, ir.Undefined), word, ir.Constant(i32, 0))
                        all_16 = bl.shuffle_vector(one, one, ir.Constant(WORDS, [0] * 16))
                        for j in range(2):
                            old = bl.load(sums[i][j])
                            bl.store(bl.call(dot, [old, bl.bitcast(all_16, bfloats), right[j]]), sums[i][j])
            for row, pair in zip(rows, sums, strict=True):
                for j, place in enumerate(pair):
                    bl.store(bl.load(place), at(bl.add(row, constant(64 * j)), FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


# Decided once, when the module is loaded: the other one is not compiled.
BACKEND = bf16_backend()
block = _amx_block if BACKEND == "amx" else _avx_block
# Palette 1; eight tiles of 16 rows of 64 bytes.
_configuration = np.zeros(64, np.uint8)
_configuration[0] = 1
_configuration[16:32:2] = 64
_configuration[48:56] = 16
_CONFIGURATION = tuple(int(x) for x in _configuration.view(np.int64))

if BACKEND == "amx":

    @kernel
    def begin(scratch):
        """Take the tile registers; scratch: address of 64 bytes."""
        words = integers(scratch, 8)
        for i in range(8):
            words[i] = _CONFIGURATION[i]
        _load_tile_configuration(scratch)

    @kernel
    def end():
        """Give the tile registers back."""
        _release_tiles()

else:

    @kernel
    def begin(scratch):
        """AVX-512 needs no preparation."""

    @kernel
    def end():
        """Nothing to give back."""


@kernel
def block_row(inner, a, a_step, b, first, count, out, columns):
    """out[32, 32 count] = 32 rows of a @ columns 32 first .. 32 (first + count) of b.

    a: rows (or columns) form at the first of the 32 rows, the next 16 rows a_step bytes on; b: pairs (or flipped)
    form; inner: padded inner size. out: float32, `columns` floats from row to row.
    """
    strip = (inner // 32) * TILE
    for j in range(count):
        block(inner // 32, a, a_step, b + 2 * (first + j) * strip, strip, out + 128 * j, 4 * columns, 0)


@kernel
def product(m, n, inner, a, a_step, b, b_step, out, columns, accumulate, scratch):
    """out[m, n] (+)= a @ b, any m and n; inner is padded. out: `columns` floats from row to row.

    a_step, b_step: bytes from 16 rows, or columns, to the next. scratch: address of 4 KB, for blocks that reach over
    an edge.
    """
    tiles = inner // 32
    wide = max(1, B_BYTES // (2 * tiles * TILE))
    for first in range(0, (n + 31) // 32, wide):
        last = min(first + wide, (n + 31) // 32)
        for i in range((m + 31) // 32):
            rows = min(32, m - 32 * i)
            for j in range(first, last):
                target = out + 4 * (32 * i * columns + 32 * j)
                left, right = a + 2 * i * a_step, b + 2 * j * b_step
                if rows == 32 and 32 * j + 32 <= n:
                    block(tiles, left, a_step, right, b_step, target, 4 * columns, 1 if accumulate else 0)
                else:
                    block(tiles, left, a_step, right, b_step, scratch, 128, 0)
                    _copy_edge(scratch, target, rows, min(32, n - 32 * j), columns, accumulate)


@kernel
def _copy_edge(source, target, rows, columns, step, accumulate):
    for r in range(rows):
        old, new = floats(target + 4 * r * step, columns), floats(source + 128 * r, columns)
        for j in range(columns):
            old[j] = old[j] + new[j] if accumulate else new[j]
