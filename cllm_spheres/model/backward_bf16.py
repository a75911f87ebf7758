"""GPT-2 backward in bfloat16: the activations that the forward left in, the gradient segment out.

B sequences, T tokens padded to 32, N = B * T rows, C channels, F channels of the feed-forward, V vocabulary,
E a head's channels padded to 32. Padding rows hold finite numbers and zero gradients.
"""

from __future__ import annotations

from numba import types

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.crystal.random import combine
from cllm_spheres.kernels import trace as K
from cllm_spheres.kernels.arrays import add_rows, copy_floats, f4, floats, matrix
from cllm_spheres.kernels.bf16.attention import attention_backward
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
from cllm_spheres.kernels.bf16.tiles import TILE, padded
from cllm_spheres.kernels.dropout import dropout_sequences
from cllm_spheres.kernels.layernorm import layernorm_backward
from cllm_spheres.kernels.progress import BACKWARD, advance
from cllm_spheres.kernels.trace import mark
from cllm_spheres.model import geometry_bf16 as G
from cllm_spheres.model.layout import (
    B_ATT,
    B_DOWN,
    B_LN1,
    B_LN2,
    B_QKV,
    B_UP,
    G_LN1,
    G_LN2,
    W_ATT,
    W_DOWN,
    W_QKV,
    W_UP,
)  # fmt: skip
from cllm_spheres.model.views import dropout_of, vector
from cllm_spheres.model.views_bf16 import activations, head_columns, tensor, weights

_QKV, _ATT, _UP, _DOWN = range(4)  # a layer's packed matrices
_project, _multiply, _turn = project.external, multiply.external, turn.external
_attention_backward = attention_backward.external


@kernel
def _weight_gradient(x_columns, dout_pairs, n, dw, rows, columns, accumulate, scratch):
    """dw[rows, columns] (+)= x.T @ dout."""
    _multiply(rows, columns, n, x_columns, dout_pairs, n // 32 * TILE, dw, 1 if accumulate else 0, scratch)


@kernel
def _embed_backward(dout_NC, ids_N, length, t, dwte_VC, dwpe_TC, accumulate):
    """Adds to dwte, which the head has written before; dwpe: `accumulate` false overwrites all its rows."""
    if not accumulate:
        dwpe_TC[:] = f4(0)
    for n in range(dout_NC.shape[0]):
        position = n % t
        if position < length:
            dout, dtoken, dplace = dout_NC[n], dwte_VC[ids_N[n]], dwpe_TC[position]
            for j in range(dout.size):
                dtoken[j] += dout[j]
            for j in range(dout.size):
                dplace[j] += dout[j]


@kernel
def _enter(dx_NC, dt_NC, t, key, first_sequence, threshold, keep_scale, rows, pairs, db_C, accumulate):
    """The residual's gradient as it enters a projection, behind dropout: both forms, and its column sums."""
    n, c = dx_NC.shape
    dy = dx_NC
    if threshold > 0:
        copy_floats(dx_NC.ctypes.data, dt_NC.ctypes.data, dx_NC.size)
        dropout_sequences(dt_NC, t, key, first_sequence, threshold, keep_scale)
        dy = dt_NC
    if db_C.size > 0:
        add_rows(dy, db_C, accumulate)
    rows_of(dy, rows, padded(c))
    _turn(rows, n, padded(c), pairs, 0)


@kernel
def _clear(sums, accumulate):
    if not accumulate:
        sums[:] = f4(0)


@kernel
def backward(g, params, packed, segment, arena, ids_N, length, key, first_sequence, accumulate, progress):
    """Gradients of everything below the final norm's output, whose gradient stands in the arena at DT.

    The head has written its share of dwte before. `accumulate` false: this call overwrites the segment.
    """
    n, c, f, heads = ids_N.size, g[G.WIDTH], g[G.FF_WIDTH], g[G.HEADS]
    t, d, cp, fp = padded(length), c // heads, padded(c), padded(f)
    e, h = padded(d), head_columns(g)
    threshold, keep_scale = dropout_of(g[G.THRESHOLD], key)
    sequences, scratch, trace = n // t, arena + g[G.SCRATCH], g[G.TRACE]
    dx, dt = matrix(arena + g[G.DX], n, c), matrix(arena + g[G.DT], n, c)
    dt_at = arena + g[G.DT]
    rows, pairs, columns, datt = arena + g[G.ROWS], arena + g[G.PAIRS], arena + g[G.COLUMNS], arena + g[G.DATT]
    wide, row_at = arena + g[G.WIDE], arena + g[G.ROW]
    stats = floats(arena + g[G.LNF_STATS], 2 * n)
    dx[:] = f4(0)
    layernorm_backward(
        dt, matrix(arena + g[G.X_LAST], n, c), vector(params, g[G.LNF_GAIN], c), stats[:n], stats[n:], dx,
        vector(segment, g[G.LNF_GAIN], c), vector(segment, g[G.LNF_BIAS], c), accumulate,
    )  # fmt: skip
    mark(trace, K.NORM_BACKWARD)
    for layer in range(g[G.LAYERS] - 1, -1, -1):
        x, ln1, qkv, lse, att, mid, ln2, up, act, stats_at = activations(g, arena, layer)
        stats = floats(stats_at, 4 * n)

        _enter(dx, dt, t, combine(key, 3 * layer + 3), first_sequence, threshold, keep_scale, rows, pairs,
               vector(segment, tensor(g, layer, B_DOWN), c), accumulate)  # fmt: skip
        mark(trace, K.RESIDUAL)
        _turn(act, n, fp, columns, 1)
        mark(trace, K.REARRANGE)
        _weight_gradient(columns, pairs, n, segment + 4 * tensor(g, layer, W_DOWN), f, c, accumulate, scratch)
        mark(trace, K.DW)
        w = weights(g, packed, 4 * layer + _DOWN)[1]
        db = vector(segment, tensor(g, layer, B_UP), f)
        sums = floats(row_at, fp)
        sums[:] = f4(0)
        # dact takes the place of the activations, which are not needed any more.
        _project(THROUGH_GELU, n, f, cp, rows, w, 0, up, act, fp, scratch, row_at, 0, 0, 0.0)
        _clear(db, accumulate)
        for j in range(db.size):
            db[j] += sums[j]
        mark(trace, K.GELU_BACKWARD)
        _turn(act, n, fp, pairs, 0)
        mark(trace, K.REARRANGE)
        _turn(ln2, n, cp, columns, 1)
        mark(trace, K.REARRANGE)
        _weight_gradient(columns, pairs, n, segment + 4 * tensor(g, layer, W_UP), c, f, accumulate, scratch)
        mark(trace, K.DW)
        w = weights(g, packed, 4 * layer + _UP)[1]
        _multiply(n, c, fp, act, w, fp // 32 * TILE, dt_at, 0, scratch)
        mark(trace, K.DX)
        layernorm_backward(
            dt, matrix(mid, n, c), vector(params, tensor(g, layer, G_LN2), c), stats[2 * n : 3 * n], stats[3 * n :],
            dx, vector(segment, tensor(g, layer, G_LN2), c), vector(segment, tensor(g, layer, B_LN2), c),
            accumulate,
        )  # fmt: skip
        mark(trace, K.NORM_BACKWARD)

        _enter(dx, dt, t, combine(key, 3 * layer + 2), first_sequence, threshold, keep_scale, rows, pairs,
               vector(segment, tensor(g, layer, B_ATT), c), accumulate)  # fmt: skip
        mark(trace, K.RESIDUAL)
        _turn(att, n, h, columns, 1)
        mark(trace, K.REARRANGE)
        dw = segment + 4 * tensor(g, layer, W_ATT)
        if d == e:
            _weight_gradient(columns, pairs, n, dw, c, c, accumulate, scratch)
        else:
            _weight_gradient(columns, pairs, n, wide, h, c, False, scratch)
            gather_heads(wide, c, d, e, c, c, matrix(dw, c, c), accumulate)
        mark(trace, K.DW)
        w = weights(g, packed, 4 * layer + _ATT)[1]
        _project(TO_ROWS, n, h, cp, rows, w, 0, datt, 0, h, scratch, 0, 0, 0, 0.0)
        mark(trace, K.DX)
        _attention_backward(
            datt, qkv, att, lse, sequences, t, heads, d, types.int64(combine(key, 3 * layer + 1)),
            first_sequence, length, threshold, scratch, rows, keep_scale,
        )  # fmt: skip
        mark(trace, K.ATTENTION_BACKWARD)
        db = vector(segment, tensor(g, layer, B_QKV), 3 * c)
        if db.size > 0:
            _clear(db, accumulate)
            wide_sums = floats(arena + g[G.WIDE_BIAS] + 4 * 3 * h, 3 * h)
            wide_sums[:] = f4(0)
            add_form_rows(rows, n, 3 * h, 3 * h, wide_sums, row_at)
            for j in range(3 * c):
                db[j] += wide_sums[j // d * e + j % d]
        mark(trace, K.RESIDUAL)
        _turn(rows, n, 3 * h, pairs, 0)
        mark(trace, K.REARRANGE)
        _turn(ln1, n, cp, columns, 1)
        mark(trace, K.REARRANGE)
        dw = segment + 4 * tensor(g, layer, W_QKV)
        if d == e:
            _weight_gradient(columns, pairs, n, dw, c, 3 * c, accumulate, scratch)
        else:
            _weight_gradient(columns, pairs, n, wide, c, 3 * h, False, scratch)
            gather_heads(wide, 3 * h, c, c, d, e, matrix(dw, c, 3 * c), accumulate)
        mark(trace, K.DW)
        w = weights(g, packed, 4 * layer + _QKV)[1]
        _multiply(n, c, 3 * h, rows, w, 3 * h // 32 * TILE, dt_at, 0, scratch)
        mark(trace, K.DX)
        layernorm_backward(
            dt, matrix(x, n, c), vector(params, tensor(g, layer, G_LN1), c), stats[:n], stats[n : 2 * n],
            dx, vector(segment, tensor(g, layer, G_LN1), c), vector(segment, tensor(g, layer, B_LN1), c),
            accumulate,
        )  # fmt: skip
        mark(trace, K.NORM_BACKWARD)
        advance(progress, BACKWARD)
    if threshold > 0:
        dropout_sequences(dx, t, combine(key, 0), first_sequence, threshold, keep_scale)
    _embed_backward(
        dx, ids_N, length, t, matrix(segment + 4 * g[G.WTE], g[G.VOCAB], c),
        matrix(segment + 4 * g[G.WPE], g[G.BLOCK_SIZE], c), accumulate,
    )  # fmt: skip
    mark(trace, K.EMBED_BACKWARD)
