"""C = start + bias + op(A) op(B) in float32 by the AVX-512 tiles of tiles.py.

A is packed into strips of up to 14 rows, as many as the second cache holds, B into strips of 32 columns, one at a time
in the first cache. k is taken in stretches; what a tile holds goes to C and comes back unchanged in between, so
every element is one chain of fused multiply-adds in the order of k, whatever the sizes of strips and stretches.
"""

from __future__ import annotations

from numba import types

from cllm_spheres.crystal.jit import entry, kernel
from cllm_spheres.kernels.sizes import STRETCH, STRIP, STRIPS, TILE_COLUMNS, TILE_ROWS
from cllm_spheres.kernels.tiles import LANES, pack_columns, pack_rows, tile

_i8 = types.int64


@kernel
def _parts(n, size):
    """n / size, rounded up."""
    return (n + size - 1) // size


@kernel
def _pack_rows_of_a(transposed, a, lda, row, rows, k0, k, strip):
    if transposed:
        pack_columns(k, a + 4 * (k0 * lda + row), 4 * lda, rows, strip, 4 * LANES)
    else:
        pack_rows(k, a + 4 * (row * lda + k0), 4 * lda, rows, strip, 4 * LANES)


@kernel
def _pack_columns_of_b(transposed, b, ldb, column, columns, k0, k, strip, step):
    for half in range(0, columns, LANES):
        some, j = min(LANES, columns - half), column + half
        if transposed:
            pack_rows(k, b + 4 * (j * ldb + k0), 4 * ldb, some, strip + 4 * half, step)
        else:
            pack_columns(k, b + 4 * (k0 * ldb + j), 4 * ldb, some, strip + 4 * half, step)


@entry(types.void(*[_i8] * 15))
def tiled_sgemm(transpose_a, transpose_b, m, n, k, a, lda, b, ldb, start, ld_start, bias, c, ldc, scratch):
    """As `gemm` in products.py; every argument an int64."""
    strips, stretches = _parts(m, TILE_ROWS), _parts(k, STRETCH)
    stretch = _parts(_parts(k, stretches), LANES) * LANES
    at_a_time = _parts(strips, _parts(strips, STRIPS))
    b_strip, a_strips = scratch, scratch + 4 * TILE_COLUMNS * STRETCH
    for k0 in range(0, k, stretch):
        depth = min(stretch, k - k0)
        strip_bytes = 4 * STRIP * _parts(depth, LANES) * LANES
        if k0 > 0:
            start, ld_start, bias = c, ldc, 0
        for first in range(0, strips, at_a_time):
            last = min(first + at_a_time, strips)
            for j in range(0, n, TILE_COLUMNS):
                columns = min(TILE_COLUMNS, n - j)
                step_b = 4 * TILE_COLUMNS if columns > LANES else 4 * LANES
                _pack_columns_of_b(transpose_b, b, ldb, j, columns, k0, depth, b_strip, step_b)
                for s in range(first, last):
                    row = s * m // strips
                    rows = (s + 1) * m // strips - row
                    a_strip = a_strips + (s - first) * strip_bytes
                    if j == 0:
                        _pack_rows_of_a(transpose_a, a, lda, row, rows, k0, depth, a_strip)
                    tile(
                        rows, depth, a_strip, 4 * STRIP, b_strip, step_b,
                        start + 4 * (row * ld_start + j) if start != 0 else 0, 4 * ld_start,
                        bias + 4 * j if bias != 0 else 0, c + 4 * (row * ldc + j), 4 * ldc, columns,
                    )  # fmt: skip
