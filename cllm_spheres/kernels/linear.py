"""out = x @ w + b, and its gradients. Weights are [in, out], as in GPT-2's checkpoints.

M rows, I inputs, O outputs. All but sizes are addresses; what may be left out is 0 then. scratch: `product_floats`
floats.
"""

from __future__ import annotations

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels.arrays import add_rows, floats, matrix
from cllm_spheres.kernels.products import gemm


@kernel
def linear_forward(m, i, o, x, w, b, residual, out, scratch):
    """out = residual + x @ w + b; overwrites out. There may be no b and no residual."""
    gemm(False, False, m, o, i, x, i, w, o, residual, o, b, out, o, scratch)


@kernel
def linear_backward(m, i, o, dout, x, w, dx, dw, accumulate_w, db, accumulate_b, scratch):
    """dx = dout @ w.T (overwrites); dw (+)= x.T @ dout, db (+)= sum of rows (no `accumulate`: overwrites).

    Each of the three may be left out.
    """
    if dx != 0:
        gemm(False, True, m, i, o, dout, o, w, o, 0, 0, 0, dx, i, scratch)
    if dw != 0:
        gemm(True, False, i, o, m, x, i, dout, o, dw if accumulate_w else 0, o, 0, dw, o, scratch)
    if db != 0:
        add_rows(matrix(dout, m, o), floats(db, o), accumulate_b)
