"""The ops that are the same in every dtype: what works on the residual stream and its gradient, which are float32.

N rows, C channels. As in fp32.py, whose docstrings these follow.
"""

from __future__ import annotations

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels.arrays import f4, floats, matrix, tokens
from cllm_spheres.kernels.dropout import dropout_sequences
from cllm_spheres.kernels.embedding import embedding_backward, embedding_forward
from cllm_spheres.kernels.layernorm import layernorm_backward
from cllm_spheres.model import record as R
from cllm_spheres.model.record import (
    accumulates,
    is_first,
    keep_scale,
    op,
    opened,
    operand,
    padded_length,
    site_key,
    size,
)


@kernel
def vector(address, n):
    """float32[n], or of length 0 where there is none."""
    return floats(address, n if address != 0 else 0)


@kernel
def _rows(address, rows, columns):
    """float32[rows, columns], or no rows where there is none."""
    return matrix(address, rows if address != 0 else 0, columns)


@kernel
def drop(r, g, which, x_NC):
    """Dropout in place; `which`: the size that is the site."""
    dropout_sequences(
        x_NC, padded_length(g), site_key(g, size(r, which)), g[R.FIRST_SEQUENCE], g[R.THRESHOLD], keep_scale(g)
    )


@op
def embed_forward(record, registers):
    """tokens [V, C], positions [T, C] -> out [N, C]. Sizes: C, V, T, site."""
    r, g = opened(record, registers)
    n, c = g[R.ROWS], size(r, 0)
    out = matrix(operand(r, g, 2), n, c)
    embedding_forward(
        tokens(g[R.INPUTS], g[R.SEQUENCES] * g[R.LENGTH]), matrix(operand(r, g, 0), size(r, 1), c),
        matrix(operand(r, g, 1), size(r, 2), c), g[R.LENGTH], padded_length(g), out,
    )  # fmt: skip
    if g[R.THRESHOLD] != 0:
        drop(r, g, 3, out)
    return 0


@op
def embed_backward(record, registers):
    """gradient [N, C] -> (dtokens [V, C]), (dpositions [T, C]), both added to. Sizes: C, V, T, site."""
    r, g = opened(record, registers)
    n, c = g[R.ROWS], size(r, 0)
    dout = matrix(operand(r, g, 0), n, c)
    if g[R.THRESHOLD] != 0:
        drop(r, g, 3, dout)
    embedding_backward(
        dout, tokens(g[R.INPUTS], g[R.SEQUENCES] * g[R.LENGTH]), g[R.LENGTH], padded_length(g),
        _rows(operand(r, g, 1), size(r, 1), c), _rows(operand(r, g, 2), size(r, 2), c), accumulates(r, g, 1),
        accumulates(r, g, 2),
    )  # fmt: skip
    return 0


@op
def norm_backward(record, registers):
    """dout, x, gain, mean, rstd -> (dx), added to; (dgain), (dbias), (scratch for dx or dgain not wanted). Sizes: C."""
    r, g = opened(record, registers)
    n, c = g[R.ROWS], size(r, 0)
    dx = matrix(operand(r, g, 5), n, c)
    if is_first(r, 5):
        dx[:] = f4(0)
    layernorm_backward(
        matrix(operand(r, g, 0), n, c), matrix(operand(r, g, 1), n, c), floats(operand(r, g, 2), c),
        floats(operand(r, g, 3), n), floats(operand(r, g, 4), n), dx, floats(operand(r, g, 6), c),
        vector(operand(r, g, 7), c), accumulates(r, g, 6),
    )  # fmt: skip
    return 0
