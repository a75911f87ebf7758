"""Products of activations with weights, and what is done to each block of 32 rows while it is still in cache.

M rows, I inputs, O outputs, all padded to 32. Activations lie in rows, weights in pairs (forward) and flipped
(backward); see tiles.py. A bias of length 0 means there is none.
"""

from __future__ import annotations

from numba import types

from cllm_spheres.crystal.jit import entry, kernel
from cllm_spheres.kernels.arrays import f4, floats, integers
from cllm_spheres.kernels.bf16.multiply import B_BYTES, block_row, product
from cllm_spheres.kernels.bf16.rows import gelu_backward_tile, gelu_tile, gelu_tiles, round_tile
from cllm_spheres.kernels.bf16.sizes import SWEEP
from cllm_spheres.kernels.bf16.tiles import TILE, columns_of, line_of, pairs_of, round_part, round_row, widen_row
from cllm_spheres.kernels.dropout import dropout

TO_ROWS, TO_GELU, TO_RESIDUAL, THROUGH_GELU = range(4)
_i8 = types.int64


@kernel
def _add_bias(scratch, column, count, bias):
    b = floats(bias + 4 * column, count)
    for r in range(32):
        x = floats(scratch + 4 * SWEEP * r, count)
        for j in range(count):
            x[j] += b[j]


@kernel
def _to_rows(scratch, at, step, groups, form):
    for half in range(2):
        for j in range(groups):
            source = scratch + 64 * SWEEP * half + 128 * j
            round_tile(source, 4 * SWEEP, form + at + half * step + j * TILE)


@kernel
def _to_gelu(scratch, at, step, groups, before, after):
    for half in range(2):
        for j in range(groups):
            source, tile = scratch + 64 * SWEEP * half + 128 * j, at + half * step + j * TILE
            gelu_tiles(source, 4 * SWEEP, before + tile, after + tile)


@kernel
def _through_gelu(scratch, at, step, groups, before, form, sums):
    for half in range(2):
        for j in range(groups):
            source, tile = scratch + 64 * SWEEP * half + 128 * j, at + half * step + j * TILE
            gelu_backward_tile(source, 4 * SWEEP, before + tile, form + tile, sums + 128 * j)


@kernel
def _to_residual(scratch, row, column, count, residual, out, columns, keys, length, threshold, keep_scale):
    for r in range(32):
        n = row + r
        x = floats(scratch + 4 * SWEEP * r, count)
        if threshold > 0:
            key = types.uint64(integers(keys, n // length + 1)[n // length])
            dropout(x, (n % length) * columns + column, key, threshold, f4(keep_scale))
        old = floats(residual + 4 * (n * columns + column), count)
        new = floats(out + 4 * (n * columns + column), count)
        for j in range(count):
            new[j] = old[j] + x[j]


@entry(_i8(*[_i8] * 14, types.float64))
def project(ending, m, n, inner, a, b, bias, first, second, columns, scratch, keys, length, threshold, keep_scale):
    """a @ b + bias, in blocks of 32 rows and up to 256 columns that are finished while they are in L1.

    All but counts are addresses; bias 0: none. columns: of a row of what is written, padded for forms. Endings:

    TO_ROWS       first = rows form of it
    TO_GELU       first = rows form of it, second = rows form of the GELU of that
    TO_RESIDUAL   second = first + dropout(it), float32; keys: uint64, of the sequences, each `length` padded rows
    THROUGH_GELU  second = rows form of it * gelu'(first); its column sums are added to float32 `keys`,
                  which has room for padded columns
    """
    strip = (inner // 32) * TILE
    blocks = (n + 31) // 32
    wide = max(SWEEP // 32, B_BYTES // (2 * strip) // (SWEEP // 32) * (SWEEP // 32))
    for start in range(0, blocks, wide):
        last = min(start + wide, blocks)
        for i in range(m // 32):
            for j in range(start, last, SWEEP // 32):
                width, row, column = min(SWEEP // 32, last - j), 32 * i, 32 * j
                count = min(n - column, 32 * width)
                block_row(inner, a + 2 * i * strip, strip, b, j, width, scratch, SWEEP)
                if bias != 0:
                    _add_bias(scratch, column, count, bias)
                at, step = 2 * i * (columns // 32) * TILE + j * TILE, columns // 32 * TILE
                if ending == TO_ROWS:
                    _to_rows(scratch, at, step, width, first)
                elif ending == TO_GELU:
                    _to_gelu(scratch, at, step, width, first, second)
                elif ending == THROUGH_GELU:
                    _through_gelu(scratch, at, step, width, first, second, keys + 4 * column)
                else:
                    _to_residual(
                        scratch, row, column, count, first, second, columns, keys, length, threshold, keep_scale
                    )
    return 0


@kernel
def rows_of(x_MC, form, columns):
    """rows form of float32 rows; columns: C padded."""
    m, c = x_MC.shape
    whole, rest, tiled = c // 32, c % 32, m // 16 * 16
    for i in range(0, tiled, 16):
        for j in range(whole):
            round_tile(x_MC[i].ctypes.data + 128 * j, 4 * c, line_of(form, i, columns) + j * TILE)
    for n in range(m):
        source, line = x_MC[n].ctypes.data, line_of(form, n, columns)
        if n >= tiled:
            round_row(source, line, whole, TILE)
        if rest > 0:
            round_part(source + 128 * whole, line + whole * TILE, rest)


@kernel
def gelu_of(before, count, after):
    """rows form of the GELU of `count` bfloat16s in rows form, as TO_GELU leaves it."""
    for at in range(0, 2 * count, TILE):
        gelu_tile(before + at, after + at)


@kernel
def add_form_rows(form, rows, columns, count, sums, row_at):
    """sums += the column sums of a rows form; columns: padded, the first `count` are added. row_at: scratch."""
    for n in range(rows):
        widen_row(line_of(form, n, columns), row_at, columns // 32, TILE)
        x = floats(row_at, columns)
        for j in range(count):
            sums[j] += x[j]


@entry(_i8(*[_i8] * 9))
def multiply(m, n, inner, a, b, b_step, out, accumulate, scratch):
    """out[m, n] (+)= a @ b, float32; a's tiles lie one after the other, b's 16 columns b_step bytes apart."""
    product(m, n, inner, a, inner // 32 * TILE, b, b_step, out, n, accumulate != 0, scratch)
    return 0


@entry(_i8(*[_i8] * 5))
def turn(form, n, c, target, to_columns):
    """pairs form from the rows form of [n, c] (padded), or with to_columns its columns form."""
    if to_columns:
        columns_of(form, target, n, c)
    else:
        pairs_of(form, target, n, c)
    return 0


@kernel
def gather_heads(wide, wide_columns, row_group, row_step, group, step, dw_IO, accumulate):
    """dw (+)= a gradient whose heads are padded: every `group` of columns (rows) lies `step` apart in `wide`."""
    i, o = dw_IO.shape
    for r in range(i):
        source = wide + 4 * wide_columns * (r // row_group * row_step + r % row_group)
        row = dw_IO[r]
        for h in range(o // group):
            x = floats(source + 4 * h * step, group)
            for j in range(group):
                at = h * group + j
                row[at] = row[at] + x[j] if accumulate else x[j]
