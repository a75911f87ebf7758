"""Weights in strips -> products that read each of them once, in order, from memory.

A matrix of I inputs and O outputs lies as strips of 32 outputs, one behind the other: for each input 32 float32, or 32
bfloat16 of which word i holds outputs i (its low half) and 16 + i. Behind the last output stand zeros. Rows that are
multiplied stand in bundles of up to 14, input by input: element (row r, input i) of a bundle of R rows at i * R + r.

Every result is one chain of fused multiply-adds in the order of the inputs, beginning with what is added: its bits do
not depend on the bundle it is computed in.
"""

from __future__ import annotations

import numpy as np
from numba import carray, types

from cllm_spheres.crystal.cpu import has
from cllm_spheres.crystal.functions.bits import bits_of_float
from cllm_spheres.crystal.jit import entry, kernel, pointer
from cllm_spheres.kernels.arrays import copy_floats, f4, floats
from cllm_spheres.kernels.sizes import TILE_COLUMNS, TILE_ROWS
from cllm_spheres.kernels.tiles import LANES, pack_columns, pack_rows, tile, tile_of_halves

_i8 = types.int64
# As many rows as the sums of a tile fit the registers: 32 of 16 floats, elsewhere 16 of 8 or 32 of 4.
BUNDLE = TILE_ROWS if has("avx512f") else 3
BUNDLE_SLACK = LANES * (BUNDLE + 1)  # floats behind a bundle, which packing writes over
_NAN_ABOVE, _QUIET = np.int32(0x7F800000), np.int32(0x400000)


def strip_bytes(inputs: int, outputs: int, halves: bool) -> int:
    """Bytes of a whole matrix in strips."""
    return -(-outputs // TILE_COLUMNS) * TILE_COLUMNS * inputs * (2 if halves else 4)


def bundle_floats(rows: int, inputs: int) -> int:
    """Floats of `rows` rows in bundles."""
    return rows * inputs + (-(-rows // BUNDLE) + 1) * BUNDLE_SLACK


@kernel
def num_strips(outputs):
    """Strips of a matrix."""
    return (outputs + TILE_COLUMNS - 1) // TILE_COLUMNS


@kernel
def num_bundles(rows):
    """Bundles of so many rows, of nearly equal size."""
    return (rows + BUNDLE - 1) // BUNDLE


@kernel
def first_row(rows, bundle):
    """The first row of a bundle; that of the next one is where it ends."""
    return bundle * rows // num_bundles(rows)


@kernel
def bundle_at(base, rows, bundle, inputs):
    """The address of a bundle."""
    return base + 4 * (first_row(rows, bundle) * inputs + bundle * BUNDLE_SLACK)


@kernel
def _half(x):
    """A float32's bits as bfloat16, to nearest, ties to even; NaN stays NaN."""
    bits = bits_of_float(x)
    if (bits & np.int32(0x7FFFFFFF)) > _NAN_ABOVE:
        return ((bits | _QUIET) >> np.int32(16)) & np.int32(0xFFFF)
    rounded = bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))
    return (rounded >> np.int32(16)) & np.int32(0xFFFF)


@kernel
def _pack_transposed(rows, inputs, columns, target):
    """16 columns of a strip from up to 16 rows of a transposed matrix, zeros behind them."""
    whole = inputs // LANES * LANES
    if columns == LANES and whole > 0:
        pack_rows(whole, rows, 4 * inputs, columns, target, 4 * TILE_COLUMNS)
    else:
        whole = 0
    for i in range(whole, inputs):
        out = floats(target + 4 * TILE_COLUMNS * i, LANES)
        for j in range(LANES):
            out[j] = floats(rows + 4 * (j * inputs + i), 1)[0] if j < columns else f4(0)


@entry(types.void(*[_i8] * 9))
def pack_strips(weights, inputs, outputs, transposed, halves, target, first, last, scratch):
    """Strips first .. last - 1 of a matrix that stands as [inputs, outputs], or transposed as [outputs, inputs].

    weights, target: addresses, target that of strip 0; scratch: 32 * (inputs + 16) floats, for halves only.
    """
    strip_size = TILE_COLUMNS * inputs
    for strip in range(first, last):
        at = scratch if halves else target + 4 * strip * strip_size
        for part in range(0, TILE_COLUMNS, LANES):
            column = strip * TILE_COLUMNS + part
            columns = min(LANES, outputs - column)
            if columns <= 0:
                for i in range(inputs):
                    floats(at + 4 * (TILE_COLUMNS * i + part), LANES)[:] = f4(0)
            elif transposed:
                _pack_transposed(weights + 4 * column * inputs, inputs, columns, at + 4 * part)
            else:
                pack_columns(inputs, weights + 4 * column, 4 * outputs, columns, at + 4 * part, 4 * TILE_COLUMNS)
        if halves:
            words = carray(pointer(target + 2 * strip * strip_size), strip_size // 2, np.int32)
            wide = floats(scratch, strip_size)
            for i in range(inputs):
                low, high = wide[TILE_COLUMNS * i :][:LANES], wide[TILE_COLUMNS * i + LANES :][:LANES]
                out = words[LANES * i :][:LANES]
                for j in range(LANES):
                    out[j] = _half(low[j]) | (_half(high[j]) << np.int32(16))


@entry(types.void(*[_i8] * 13))
def multiply_strips(
    bundles, rows, inputs, strips, halves, first, last, bias, start, out, outputs, bundle_first, bundle_last
):
    """out[rows, outputs] = start + bias + rows @ strips, of strips first .. last - 1 and some bundles of rows.

    Addresses; start (rows like out's) and bias may be 0 for none, and start may be out.
    """
    for strip in range(first, last):
        column = strip * TILE_COLUMNS
        columns = min(TILE_COLUMNS, outputs - column)
        b = strips + (2 if halves else 4) * strip * TILE_COLUMNS * inputs
        for bundle in range(bundle_first, bundle_last):
            row = first_row(rows, bundle)
            count = first_row(rows, bundle + 1) - row
            a, place = bundle_at(bundles, rows, bundle, inputs), 4 * (row * outputs + column)
            added = start + place if start != 0 else 0
            bias_at = bias + 4 * column if bias != 0 else 0
            if halves:
                tile_of_halves(
                    count, inputs, a, 4 * count, b, 2 * TILE_COLUMNS, added, 4 * outputs, bias_at, out + place,
                    4 * outputs, columns,
                )  # fmt: skip
            else:
                tile(
                    count, inputs, a, 4 * count, b, 4 * TILE_COLUMNS, added, 4 * outputs, bias_at, out + place,
                    4 * outputs, columns,
                )  # fmt: skip


@kernel
def bundle_rows(x, inputs, rows, bundle, base):
    """Rows of a matrix [rows, inputs] at address x -> their place in the bundle they belong to."""
    row = first_row(rows, bundle)
    count = first_row(rows, bundle + 1) - row
    source, target = x + 4 * row * inputs, bundle_at(base, rows, bundle, inputs)
    if count == 1:
        copy_floats(source, target, inputs)
    else:
        pack_rows(inputs, source, 4 * inputs, count, target, 4 * count)
