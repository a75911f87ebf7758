"""out = x @ w + b, and its gradients. Weights are [in, out], as in GPT-2's checkpoints.

M rows, I inputs, O outputs. A bias of length 0 means there is none. scratch: the address of `product_floats` floats.
"""

from __future__ import annotations

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels.arrays import add_rows
from cllm_spheres.kernels.products import gemm


@kernel
def linear_forward(x_MI, w_IO, b_O, out_MO, scratch):
    """out = x @ w + b; overwrites out."""
    m, i, o = x_MI.shape[0], x_MI.shape[1], out_MO.shape[1]
    bias = b_O.ctypes.data if b_O.size > 0 else 0
    gemm(
        False, False, m, o, i, x_MI.ctypes.data, i, w_IO.ctypes.data, o, 0, 0, bias, out_MO.ctypes.data, o, scratch
    )  # fmt: skip


@kernel
def linear_residual_forward(x_MI, w_IO, b_O, residual_MO, out_MO, scratch):
    """out = residual + x @ w + b; overwrites out."""
    m, i, o = x_MI.shape[0], x_MI.shape[1], out_MO.shape[1]
    bias = b_O.ctypes.data if b_O.size > 0 else 0
    gemm(
        False, False, m, o, i, x_MI.ctypes.data, i, w_IO.ctypes.data, o, residual_MO.ctypes.data, o, bias,
        out_MO.ctypes.data, o, scratch,
    )  # fmt: skip


@kernel
def linear_backward(dout_MO, x_MI, w_IO, dx_MI, dw_IO, db_O, accumulate, scratch):
    """dx = dout @ w.T (overwrites); dw (+)= x.T @ dout, db (+)= sum of rows (`accumulate` false overwrites)."""
    m, i, o = x_MI.shape[0], x_MI.shape[1], dout_MO.shape[1]
    x, dout, dw = x_MI.ctypes.data, dout_MO.ctypes.data, dw_IO.ctypes.data
    gemm(False, True, m, i, o, dout, o, w_IO.ctypes.data, o, 0, 0, 0, dx_MI.ctypes.data, i, scratch)
    gemm(True, False, i, o, m, x, i, dout, o, dw if accumulate else 0, o, 0, dw, o, scratch)
    if db_O.size > 0:
        add_rows(dout_MO, db_O, accumulate)
