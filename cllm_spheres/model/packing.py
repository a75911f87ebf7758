"""The float32 weights -> the forms in which the bfloat16 products take them, unit by unit.

A unit is 32 rows of a matrix and up to 512 columns. It is a pure function of the parameters: who packs it does not
matter, and packing again changes nothing.
"""

from __future__ import annotations

from numba import types

from cllm_spheres.crystal.jit import entry, kernel
from cllm_spheres.kernels.bf16.tiles import TILE, flip_tile, line_of, padded, pair_block, round_part
from cllm_spheres.kernels.fpu import flush_subnormals, restore
from cllm_spheres.model import geometry_bf16 as G
from cllm_spheres.model.views_bf16 import card, matrix_at

_i8 = types.int64


@kernel
def _padded_size(size, group):
    return size // group * padded(group)


@entry(_i8(_i8, _i8, _i8, _i8))
def pack_unit_bf16(geometry, params, packed, unit):
    """Both forms of one unit. geometry, params (float32), packed: addresses."""
    state = flush_subnormals()
    g = card(geometry)
    m = matrix_at(g, 0)
    while m + G.MATRIX_WORDS < g.size and g[m + G.MATRIX_WORDS + G.M_FIRST_UNIT] <= unit:
        m += G.MATRIX_WORDS
    rows, columns, row_group, column_group = (
        g[m + G.M_ROWS],
        g[m + G.M_COLUMNS],
        g[m + G.M_ROW_GROUP],
        g[m + G.M_COLUMN_GROUP],
    )
    down, across = _padded_size(rows, row_group), _padded_size(columns, column_group)
    chunks = (across // 32 + G.GROUPS_A_UNIT - 1) // G.GROUPS_A_UNIT
    index = unit - g[m + G.M_FIRST_UNIT]
    block, first = index // chunks, index % chunks * G.GROUPS_A_UNIT
    last = min(first + G.GROUPS_A_UNIT, across // 32)
    source = params + 4 * g[m + G.M_PARAMS]
    pairs, flipped = packed + g[m + G.M_PAIRS], packed + g[m + G.M_FLIPPED]
    row_step, column_step = padded(row_group), padded(column_group)
    # The rows form stands for a moment where the flipped form goes: they are turned in place.
    for r in range(32 * block, 32 * block + 32):
        row = r // row_step * row_group + r % row_step
        real = r % row_step < row_group and row < rows
        line = line_of(flipped, r, across)
        for j in range(first, last):
            column = 32 * j % column_step
            count = min(32, column_group - column) if real else 0
            at = row * columns + 32 * j // column_step * column_group + column
            round_part(source + 4 * at, line + j * TILE, count)
    strip, step = across // 32 * TILE, down // 32 * TILE
    for j in range(first, last):
        upper = flipped + 2 * block * strip + j * TILE
        target = pairs + 2 * j * step + block * TILE
        pair_block(upper, upper + strip, target, target + step)
        flip_tile(upper, upper)
        flip_tile(upper + strip, upper + strip)
    restore(state)
    return 0
