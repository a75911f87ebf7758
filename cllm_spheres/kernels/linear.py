"""out = x @ w + b, and its gradients. Weights are [in, out], as in GPT-2's checkpoints.

M rows, I inputs, O outputs. A bias of length 0 means there is none.
"""

from __future__ import annotations

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels.arrays import add_rows, f4
from cllm_spheres.kernels.blas import gemm


@kernel
def linear_forward(x_MI, w_IO, b_O, out_MO):
    """out = x @ w + b; overwrites out."""
    m, i, o = x_MI.shape[0], x_MI.shape[1], out_MO.shape[1]
    beta = f4(0)
    if b_O.size > 0:
        beta = f4(1)
        for r in range(m):
            row = out_MO[r]
            for j in range(o):
                row[j] = b_O[j]
    gemm(False, False, m, o, i, x_MI.ctypes.data, i, w_IO.ctypes.data, o, beta, out_MO.ctypes.data, o)


@kernel
def linear_residual_forward(x_MI, w_IO, b_O, residual_MO, out_MO):
    """out = residual + x @ w + b; overwrites out. The residual is laid down first and the product added to it."""
    m, i, o = x_MI.shape[0], x_MI.shape[1], out_MO.shape[1]
    if b_O.size > 0:
        for r in range(m):
            row, old = out_MO[r], residual_MO[r]
            for j in range(o):
                row[j] = old[j] + b_O[j]
    else:
        for r in range(m):
            row, old = out_MO[r], residual_MO[r]
            for j in range(o):
                row[j] = old[j]
    gemm(False, False, m, o, i, x_MI.ctypes.data, i, w_IO.ctypes.data, o, f4(1), out_MO.ctypes.data, o)


@kernel
def linear_backward(dout_MO, x_MI, w_IO, dx_MI, dw_IO, db_O, accumulate):
    """dx = dout @ w.T (overwrites); dw (+)= x.T @ dout, db (+)= sum of rows (`accumulate` false overwrites)."""
    m, i, o = x_MI.shape[0], x_MI.shape[1], dout_MO.shape[1]
    beta = f4(1) if accumulate else f4(0)
    gemm(False, True, m, i, o, dout_MO.ctypes.data, o, w_IO.ctypes.data, o, f4(0), dx_MI.ctypes.data, i)
    gemm(True, False, i, o, m, x_MI.ctypes.data, i, dout_MO.ctypes.data, o, beta, dw_IO.ctypes.data, o)
    if db_O.size > 0:
        add_rows(dout_MO, db_O, accumulate)
