"""The float32 weights -> the forms in which the bfloat16 products take them, unit by unit.

A unit is 32 rows of a matrix and up to 512 columns. It is a pure function of the parameters: who packs it does not
matter, and packing again changes nothing.
"""

from __future__ import annotations

from numba import types

from cllm_spheres.crystal.jit import entry
from cllm_spheres.kernels.arrays import integers
from cllm_spheres.kernels.bf16 import sizes as S
from cllm_spheres.kernels.bf16.tiles import TILE, flip_tile, line_of, padded, padded_groups, pair_block, round_part
from cllm_spheres.kernels.fpu import flush_subnormals, restore

_i8 = types.int64


@entry(_i8(*[_i8] * 5))
def pack_unit(table, params, frozen, packed, unit):
    """Both forms of one unit. table: of a `Packing` (model/packed.py); params and frozen: float32. All addresses."""
    state = flush_subnormals()
    matrices = integers(table, 1)[0]
    words = integers(table + 8, matrices * S.MATRIX_WORDS)
    at = 0
    while at + S.MATRIX_WORDS < words.size and words[at + S.MATRIX_WORDS + S.M_FIRST_UNIT] <= unit:
        at += S.MATRIX_WORDS
    m = words[at : at + S.MATRIX_WORDS]
    rows, columns, row_group, column_group = m[S.M_ROWS], m[S.M_COLUMNS], m[S.M_ROW_GROUP], m[S.M_COLUMN_GROUP]
    down, across = padded_groups(rows, row_group), padded_groups(columns, column_group)
    chunks = (across // 32 + S.GROUPS_A_UNIT - 1) // S.GROUPS_A_UNIT
    index = unit - m[S.M_FIRST_UNIT]
    block, first = index // chunks, index % chunks * S.GROUPS_A_UNIT
    last = min(first + S.GROUPS_A_UNIT, across // 32)
    source = (frozen if m[S.M_FROZEN] != 0 else params) + 4 * m[S.M_PARAMS]
    pairs, flipped = packed + m[S.M_PAIRS], packed + m[S.M_FLIPPED]
    row_step, column_step = padded(row_group), padded(column_group)
    # The rows form stands for a moment where the flipped form goes: they are turned in place.
    for r in range(32 * block, 32 * block + 32):
        row = r // row_step * row_group + r % row_step
        real = r % row_step < row_group and row < rows
        line = line_of(flipped, r, across)
        for j in range(first, last):
            column = 32 * j % column_step
            count = min(32, column_group - column) if real else 0
            start = row * columns + 32 * j // column_step * column_group + column
            round_part(source + 4 * start, line + j * TILE, count)
    strip, step = across // 32 * TILE, down // 32 * TILE
    for j in range(first, last):
        upper = flipped + 2 * block * strip + j * TILE
        target = pairs + 2 * j * step + block * TILE
        pair_block(upper, upper + strip, target, target + step)
        flip_tile(upper, upper)
        flip_tile(upper + strip, upper + strip)
    restore(state)
    return 0
