"""Layer normalisation whose result goes straight into tiles. N rows, C channels, padded to P."""

from __future__ import annotations

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels.arrays import floats
from cllm_spheres.kernels.bf16.tiles import TILE, line_of, round_row
from cllm_spheres.kernels.layernorm import layernorm_forward


@kernel
def layernorm_rows(x_NC, gain_C, bias_C, form, mean_N, rstd_N, row_P):
    """rows form of the normed rows; mean_N and rstd_N as in layernorm_forward. row_P: scratch of P floats."""
    c, columns = x_NC.shape[1], row_P.size
    row_P[c:] = 0
    out = floats(row_P.ctypes.data, c).reshape(1, c)
    for n in range(x_NC.shape[0]):
        layernorm_forward(x_NC[n : n + 1], gain_C, bias_C, out, mean_N[n : n + 1], rstd_N[n : n + 1])
        round_row(row_P.ctypes.data, line_of(form, n, columns), columns // 32, TILE)
