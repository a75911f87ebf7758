"""The ops in float32. N rows, C channels; operands in the order of each docstring, those in brackets may be nothing.

What an op writes is overwritten, unless it says that it adds; where an operand is a gradient of parameters, the program
says which (model/record.py).
"""

from __future__ import annotations

from cllm_spheres.kernels.arrays import copy_floats, doubles, f4, floats, matrix, tokens
from cllm_spheres.kernels.attention import attention_backward as backward_of_attention
from cllm_spheres.kernels.attention import attention_forward as forward_of_attention
from cllm_spheres.kernels.cross_entropy import head_loss as loss_of_head
from cllm_spheres.kernels.cross_entropy import head_loss_backward
from cllm_spheres.kernels.gelu import gelu_backward, gelu_forward
from cllm_spheres.kernels.layernorm import layernorm_forward
from cllm_spheres.kernels.linear import linear_backward as gradients_of_linear
from cllm_spheres.kernels.linear import linear_forward as product_of_linear
from cllm_spheres.kernels.products import gemm
from cllm_spheres.kernels.trace import mark
from cllm_spheres.model import record as R
from cllm_spheres.model.ops.common import drop, vector
from cllm_spheres.model.ops.common import embed_backward as embed_backward
from cllm_spheres.model.ops.common import embed_forward as embed_forward
from cllm_spheres.model.ops.common import norm_backward as norm_backward
from cllm_spheres.model.record import accumulates, keep_scale, number, op, opened, operand, site_key, size


@op
def norm_forward(record, registers):
    """x [N, C], gain [C], (bias [C]) -> out [N, C], mean [N], rstd [N]. Sizes: C."""
    r, g = opened(record, registers)
    n, c = g[R.ROWS], size(r, 0)
    layernorm_forward(
        matrix(operand(r, g, 0), n, c), floats(operand(r, g, 1), c), vector(operand(r, g, 2), c),
        matrix(operand(r, g, 3), n, c), floats(operand(r, g, 4), n), floats(operand(r, g, 5), n),
    )  # fmt: skip
    return 0


@op
def linear_forward(record, registers):
    """x [N, I], w [I, O], (bias [O]), (residual [N, O]) -> (before [N, O]), out [N, O]; scratch.

    out = x @ w + bias; residual + dropout of it; or, where `before` is to have it, its GELU. Sizes: I, O, site, and
    what the time before the GELU is called.
    """
    r, g = opened(record, registers)
    n, i, o = g[R.ROWS], size(r, 0), size(r, 1)
    x, w, bias, residual = operand(r, g, 0), operand(r, g, 1), operand(r, g, 2), operand(r, g, 3)
    before, out, scratch = operand(r, g, 4), operand(r, g, 5), operand(r, g, 6)
    drops = residual != 0 and g[R.THRESHOLD] != 0
    product = before if before != 0 else out
    product_of_linear(n, i, o, x, w, bias, 0 if drops else residual, product, scratch)
    if before != 0:
        mark(g[R.TRACE], size(r, 3))
        gelu_forward(floats(before, n * o), floats(out, n * o))
    if drops:
        drop(r, g, 2, matrix(out, n, o))
        new, old = floats(out, n * o), floats(residual, n * o)
        for j in range(n * o):
            new[j] += old[j]
    return 0


@op
def activate(record, registers):
    """before [N, C] -> its GELU [N, C]. Sizes: C."""
    r, g = opened(record, registers)
    elements = g[R.ROWS] * size(r, 0)
    gelu_forward(floats(operand(r, g, 0), elements), floats(operand(r, g, 1), elements))
    return 0


@op
def linear_backward(record, registers):
    """dout [N, O], (x [N, I]), w [I, O], (before [N, I]) -> (dx [N, I]), (dw), (db); scratch, (room [N, O]).

    Of a product with dropout (its site is not negative) room has the gradient behind it. Where x is the GELU of
    `before`, dx becomes the gradient of that. Sizes: I, O, site, what the time of the GELU is called.
    """
    r, g = opened(record, registers)
    n, i, o = g[R.ROWS], size(r, 0), size(r, 1)
    dout, x, w, before = operand(r, g, 0), operand(r, g, 1), operand(r, g, 2), operand(r, g, 3)
    dx, dw, db = operand(r, g, 4), operand(r, g, 5), operand(r, g, 6)
    scratch, room = operand(r, g, 7), operand(r, g, 8)
    if size(r, 2) >= 0 and g[R.THRESHOLD] != 0:
        copy_floats(dout, room, n * o)
        dout = room
        drop(r, g, 2, matrix(dout, n, o))
    gradients_of_linear(
        n, i, o, dout, x, w, dx, dw, accumulates(r, g, 5), db, accumulates(r, g, 6), scratch
    )  # fmt: skip
    if before != 0 and dx != 0:
        mark(g[R.TRACE], size(r, 3))
        gelu_backward(floats(before, n * i), floats(dx, n * i))
    return 0


@op
def attention_forward(record, registers):
    """qkv [N, 3 C] -> out [N, C], lse [B, H, T]; scratch. Sizes: C, H, site."""
    r, g = opened(record, registers)
    n, c, heads = g[R.ROWS], size(r, 0), size(r, 1)
    forward_of_attention(
        matrix(operand(r, g, 0), n, 3 * c), g[R.LENGTH], heads, site_key(g, size(r, 2)), g[R.FIRST_SEQUENCE],
        g[R.THRESHOLD], keep_scale(g), floats(operand(r, g, 3), 1), matrix(operand(r, g, 1), n, c),
        floats(operand(r, g, 2), n * heads),
    )  # fmt: skip
    return 0


@op
def attention_backward(record, registers):
    """dout [N, C], qkv [N, 3 C], out [N, C], lse [B, H, T] -> dqkv [N, 3 C]; scratch. Sizes: C, H, site."""
    r, g = opened(record, registers)
    n, c, heads = g[R.ROWS], size(r, 0), size(r, 1)
    backward_of_attention(
        matrix(operand(r, g, 0), n, c), matrix(operand(r, g, 1), n, 3 * c), matrix(operand(r, g, 2), n, c),
        floats(operand(r, g, 3), n * heads), g[R.LENGTH], heads, site_key(g, size(r, 2)), g[R.FIRST_SEQUENCE],
        g[R.THRESHOLD], keep_scale(g), floats(operand(r, g, 5), 1), matrix(operand(r, g, 4), n, 3 * c),
    )  # fmt: skip
    return 0


@op
def head_train(record, registers):
    """x [N, C], w [V, C] -> (dx [N, C]), (dw [V, C]); logits [R, V], scratch. Sizes: C, V, R. Adds to the losses."""
    r, g = opened(record, registers)
    n, c, v = g[R.ROWS], size(r, 0), size(r, 1)
    loss, excess = head_loss_backward(
        matrix(operand(r, g, 0), n, c), matrix(operand(r, g, 1), v, c), tokens(g[R.TARGETS], n),
        f4(number(g, R.SCALE)), g[R.SOFT], matrix(operand(r, g, 4), size(r, 2), v), operand(r, g, 2),
        operand(r, g, 3), accumulates(r, g, 3), operand(r, g, 5),
    )  # fmt: skip
    results = doubles(g.ctypes.data, R.REGISTERS)
    results[R.LOSS] += loss
    results[R.EXCESS] += excess
    return 0


@op
def head_evaluate(record, registers):
    """x [N, C], w [V, C]; logits [R, V], scratch -> LOSS and CORRECT of the rows from FIRST_ROW on. Sizes: C, V, R."""
    r, g = opened(record, registers)
    n, c, v = g[R.ROWS], size(r, 0), size(r, 1)
    first = g[R.FIRST_ROW]
    loss = loss_of_head(
        matrix(operand(r, g, 0), n, c)[first:], matrix(operand(r, g, 1), v, c), tokens(g[R.TARGETS], n)[first:],
        matrix(operand(r, g, 2), size(r, 2), v), operand(r, g, 3), g[R.CORRECT : R.CORRECT + 1],
    )  # fmt: skip
    doubles(g.ctypes.data, R.REGISTERS)[R.LOSS] = loss
    return 0


@op
def head_logits(record, registers):
    """x [N, C], w [V, C]; scratch -> OUTPUT, of the rows from FIRST_ROW on. Sizes: C, V."""
    r, g = opened(record, registers)
    n, c, v = g[R.ROWS], size(r, 0), size(r, 1)
    first = g[R.FIRST_ROW]
    gemm(
        False, True, n - first, v, c, operand(r, g, 0) + 4 * first * c, c, operand(r, g, 1), c, 0, 0, 0, g[R.OUTPUT],
        v, operand(r, g, 2),
    )  # fmt: skip
    return 0
