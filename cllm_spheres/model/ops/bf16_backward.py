"""The ops of the backward pass in bfloat16, but for the head's and for those of common.py. As in bf16.py."""

from __future__ import annotations

from numba import types

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels import trace as K
from cllm_spheres.kernels.arrays import add_rows, copy_floats, f4, floats, matrix
from cllm_spheres.kernels.bf16.attention import attention_backward as backward_of_attention
from cllm_spheres.kernels.bf16.linear import (
    THROUGH_GELU,
    TO_ROWS,
    add_form_rows,
    gather_heads,
    multiply,
    project,
    rows_of,
    turn,
)
from cllm_spheres.kernels.bf16.sizes import SWEEP
from cllm_spheres.kernels.bf16.tiles import TILE, padded, padded_groups
from cllm_spheres.kernels.trace import mark
from cllm_spheres.model import record as R
from cllm_spheres.model.ops.common import drop
from cllm_spheres.model.record import accumulates, keep_scale, op, opened, operand, padded_length, site_key, size

_project, _multiply, _turn = project.external, multiply.external, turn.external
_attention_backward = backward_of_attention.external


@op
def attention_backward(record, registers):
    """dout, qkv, out in rows, lse [B, H, T] -> dqkv in rows; scratch. Sizes: C of a head, H, site."""
    r, g = opened(record, registers)
    _attention_backward(
        operand(r, g, 0), operand(r, g, 1), operand(r, g, 2), operand(r, g, 3), g[R.SEQUENCES], padded_length(g),
        size(r, 1), size(r, 0), types.int64(site_key(g, size(r, 2))), g[R.FIRST_SEQUENCE], g[R.LENGTH],
        g[R.THRESHOLD], operand(r, g, 5), operand(r, g, 4), keep_scale(g),
    )  # fmt: skip
    return 0


@kernel
def _enter(r, g, dout_NC, rows, dropped, db):
    """A gradient as it enters a projection, behind dropout: in rows, and the column sums."""
    n, c = dout_NC.shape
    dy = dout_NC
    if g[R.THRESHOLD] != 0:
        copy_floats(dout_NC.ctypes.data, dropped, dout_NC.size)
        dy = matrix(dropped, n, c)
        drop(r, g, 4, dy)
    if db != 0:
        add_rows(dy, floats(db, c), accumulates(r, g, 6))
    rows_of(dy, rows, padded(c))


@kernel
def _add_sums(sums, group, db, accumulate):
    """db (+)= sums, of which every `group` lies padded."""
    step = padded(group)
    for j in range(db.size):
        old = db[j] if accumulate else f4(0)
        db[j] = old + sums[j // group * step + j % group]


@kernel
def _bias_gradient(rows, n, columns, group, room, db, accumulate):
    """db (+)= the column sums of a gradient in rows."""
    sums = floats(room, columns)
    sums[:] = f4(0)
    add_form_rows(rows, n, columns, columns, sums, room + 4 * columns)
    _add_sums(sums, group, db, accumulate)


@kernel
def _weight_gradient(r, g, columns, pairs, scratch, spread, dw):
    """dw [I, O] (+)= x.T @ dout; `spread`: room for it with padded heads, 0 where there are none."""
    n, i, i_group, o, o_group = g[R.ROWS], size(r, 0), size(r, 1), size(r, 2), size(r, 3)
    step, accumulate = n // 32 * TILE, accumulates(r, g, 5)
    if spread == 0:
        _multiply(i, o, n, columns, pairs, step, dw, 1 if accumulate else 0, scratch)
        return
    i_step, o_step = padded(i_group) if i_group != i else i, padded(o_group) if o_group != o else o
    down, across = i // i_group * i_step, o // o_group * o_step
    _multiply(down, across, n, columns, pairs, step, spread, 0, scratch)
    gather_heads(spread, across, i_group, i_step, o_group, o_step, matrix(dw, i, o), accumulate)


@op
def linear_backward(record, registers):
    """dout, (x in rows), w flipped, (before in rows) -> (dx), (dw), (db), (db before); scratch, and rooms.

    dout [N, O] of a sum with a residual, which has room for it in rows and, where it is dropped, for what is left;
    else it is in rows. Where x is the GELU of `before`, dx becomes the gradient of that, in rows, whose place may be
    that of x, and db before the gradient of the bias which was added to it. For dw there is room for dout in pairs,
    x in columns, and where heads are padded for dw as it comes. Sizes: I, I of a head, O, O of a head, site, whether
    dx is float32.
    """
    r, g = opened(record, registers)
    n, i, inner = g[R.ROWS], size(r, 0), padded_groups(size(r, 0), size(r, 1))
    o, outer = size(r, 2), padded_groups(size(r, 2), size(r, 3))
    x, w, before, dx, dw = operand(r, g, 1), operand(r, g, 2), operand(r, g, 3), operand(r, g, 4), operand(r, g, 5)
    db, scratch, rows, pairs = operand(r, g, 6), operand(r, g, 8), operand(r, g, 9), operand(r, g, 10)
    columns, room = operand(r, g, 11), scratch + 4 * 32 * SWEEP
    if rows != 0:
        _enter(r, g, matrix(operand(r, g, 0), n, o), rows, operand(r, g, 12), db)
    else:
        rows = operand(r, g, 0)
        if db != 0:
            _bias_gradient(rows, n, outer, size(r, 3), room, floats(db, o), accumulates(r, g, 6))
    mark(g[R.TRACE], K.RESIDUAL)
    if dw != 0:
        _turn(rows, n, outer, pairs, 0)
        _turn(x, n, inner, columns, 1)
        mark(g[R.TRACE], K.REARRANGE)
        _weight_gradient(r, g, columns, pairs, scratch, operand(r, g, 13), dw)
        mark(g[R.TRACE], K.DW)
    if before != 0:
        sums, db_before = floats(room, inner), operand(r, g, 7)
        sums[:] = f4(0)
        _project(THROUGH_GELU, n, i, outer, rows, w, 0, before, dx, inner, scratch, room, 0, 0, 0.0)
        if db_before != 0:
            _add_sums(sums, i, floats(db_before, i), accumulates(r, g, 7))
    elif dx != 0 and size(r, 5) != 0:
        _multiply(n, i, outer, rows, w, outer // 32 * TILE, dx, 0, scratch)
    elif dx != 0:
        _project(TO_ROWS, n, inner, outer, rows, w, 0, dx, 0, inner, scratch, 0, 0, 0, 0.0)
    return 0
