"""GPT-2 as a page of kernel calls: parameters and tokens in, loss and the gradient segment out.

Pre-LayerNorm blocks with causal attention and a tanh GELU, learned positions, a tied output. `compute_shard`,
`evaluate_window` and `compute_logits` are the only compiled entries: training, the library and the tests call
the same machine code.

B sequences, T tokens of a sequence, N = B * T rows, C channels, F channels of the feed-forward, V vocabulary.
"""

from __future__ import annotations

from numba import types

from cllm_spheres.crystal.jit import entry, kernel
from cllm_spheres.crystal.random import combine
from cllm_spheres.kernels.arrays import f4, floats, integers, matrix, tokens
from cllm_spheres.kernels.attention import attention_backward, attention_forward
from cllm_spheres.kernels.blas import gemm
from cllm_spheres.kernels.cross_entropy import head_loss, head_loss_backward
from cllm_spheres.kernels.dropout import dropout_sequences
from cllm_spheres.kernels.embedding import embedding_backward, embedding_forward
from cllm_spheres.kernels.fpu import flush_subnormals, restore
from cllm_spheres.kernels.gelu import gelu_backward, gelu_forward
from cllm_spheres.kernels.layernorm import layernorm_backward, layernorm_forward
from cllm_spheres.kernels.linear import linear_backward, linear_forward, linear_residual_forward
from cllm_spheres.model import geometry as G
from cllm_spheres.model.layout import (
    B_ATT,
    B_DOWN,
    B_LN1,
    B_LN2,
    B_QKV,
    B_UP,
    G_LN1,
    G_LN2,
    LAYER_TENSORS,
    W_ATT,
    W_DOWN,
    W_QKV,
    W_UP,
)  # fmt: skip

_PER_LAYER = len(LAYER_TENSORS)
_i8, _d8 = types.int64, types.float64


@kernel
def _tensor(g, base, layer, which, rows, columns):
    """A layer's matrix in a buffer of parameters or gradients."""
    return matrix(base + 4 * g[G.LAYER_OFFSETS + layer * _PER_LAYER + which], rows, columns)


@kernel
def _vector(g, base, layer, which, size):
    """A layer's vector; of length 0 where the model has none (no biases)."""
    offset = g[G.LAYER_OFFSETS + layer * _PER_LAYER + which]
    return floats(base + 4 * max(offset, 0), size if offset >= 0 else 0)


@kernel
def _final_vector(g, base, which, size):
    return floats(base + 4 * max(g[which], 0), size if g[which] >= 0 else 0)


@kernel
def _keep_scale(g):
    return f4(1.0 / (1.0 - g[G.THRESHOLD] / 4294967296.0))


@kernel
def _add_projection(x, w, b, residual, out, g, length, key, first_sequence):
    """out = residual + dropout(x @ w + b)."""
    if g[G.THRESHOLD] == 0 or key == 0:
        linear_residual_forward(x, w, b, residual, out)
        return
    linear_forward(x, w, b, out)
    dropout_sequences(out, length, key, first_sequence, g[G.THRESHOLD], _keep_scale(g))
    for n in range(out.shape[0]):
        row, old = out[n], residual[n]
        for j in range(row.size):
            row[j] += old[j]


@kernel
def _site_key(key, site):
    """The dropout key of one place in the model; 0 stays 0: no dropout."""
    return combine(key, site) if key != 0 else key


@kernel
def forward(g, params, arena, ids_N, length, key, first_sequence, progress):
    """All activations of N = ids_N.size rows into the arena; returns the final normed rows [N, C].

    params, arena: addresses. key: uint64 dropout key of the step, 0 for none.
    """
    n, c, f, heads = ids_N.size, g[G.WIDTH], g[G.FF_WIDTH], g[G.HEADS]
    threshold = g[G.THRESHOLD] if key != 0 else 0
    scratch = floats(arena + 4 * g[G.SCRATCH], 1)
    num_layers = g[G.LAYERS]
    first_x = arena + 4 * (g[G.X] if num_layers > 0 else g[G.X_LAST])
    x = matrix(first_x, n, c)
    wte = matrix(params + 4 * g[G.WTE], g[G.VOCAB], c)
    embedding_forward(ids_N, wte, matrix(params + 4 * g[G.WPE], g[G.BLOCK_SIZE], c), length, x)
    if threshold > 0:
        dropout_sequences(x, length, _site_key(key, 0), first_sequence, threshold, _keep_scale(g))
    for layer in range(num_layers):
        at = arena + 4 * layer * g[G.LAYER_FLOATS]
        after = at + 4 * (g[G.LAYER_FLOATS] + g[G.X]) if layer + 1 < num_layers else arena + 4 * g[G.X_LAST]
        x, ln1, att = (
            matrix(at + 4 * g[G.X], n, c),
            matrix(at + 4 * g[G.LN1], n, c),
            matrix(at + 4 * g[G.ATT], n, c),
        )
        mid, ln2, x_next = (
            matrix(at + 4 * g[G.MID], n, c),
            matrix(at + 4 * g[G.LN2], n, c),
            matrix(after, n, c),
        )
        qkv, up = matrix(at + 4 * g[G.QKV], n, 3 * c), matrix(at + 4 * g[G.UP], n, f)
        act, lse = matrix(at + 4 * g[G.ACT], n, f), floats(at + 4 * g[G.LSE], heads * n)
        stats = floats(at + 4 * g[G.STATS], 4 * n)

        layernorm_forward(
            x,
            _vector(g, params, layer, G_LN1, c),
            _vector(g, params, layer, B_LN1, c),
            ln1,
            stats[:n],
            stats[n : 2 * n],
        )
        linear_forward(ln1, _tensor(g, params, layer, W_QKV, c, 3 * c), _vector(g, params, layer, B_QKV, 3 * c), qkv)
        attention_forward(
            qkv,
            length,
            heads,
            _site_key(key, 3 * layer + 1),
            first_sequence,
            threshold,
            _keep_scale(g),
            scratch,
            att,
            lse,
        )
        _add_projection(
            att, _tensor(g, params, layer, W_ATT, c, c), _vector(g, params, layer, B_ATT, c), x, mid,
            g, length, _site_key(key, 3 * layer + 2), first_sequence,
        )  # fmt: skip
        layernorm_forward(
            mid, _vector(g, params, layer, G_LN2, c), _vector(g, params, layer, B_LN2, c), ln2,
            stats[2 * n : 3 * n], stats[3 * n : 4 * n],
        )  # fmt: skip
        linear_forward(ln2, _tensor(g, params, layer, W_UP, c, f), _vector(g, params, layer, B_UP, f), up)
        gelu_forward(up.reshape(n * f), act.reshape(n * f))
        _add_projection(
            act, _tensor(g, params, layer, W_DOWN, f, c), _vector(g, params, layer, B_DOWN, c), mid, x_next,
            g, length, _site_key(key, 3 * layer + 3), first_sequence,
        )  # fmt: skip
        progress[0] += 1
    x_last, lnf = matrix(arena + 4 * g[G.X_LAST], n, c), matrix(arena + 4 * g[G.LNF], n, c)
    stats = floats(arena + 4 * g[G.LNF_STATS], 2 * n)
    layernorm_forward(
        x_last,
        _final_vector(g, params, G.LNF_GAIN, c),
        _final_vector(g, params, G.LNF_BIAS, c),
        lnf,
        stats[:n],
        stats[n:],
    )
    return lnf


@kernel
def backward(g, params, segment, arena, ids_N, length, key, first_sequence, accumulate, progress):
    """Gradients of everything below the final norm's output, whose gradient stands in the arena at DT.

    The head has written its share of dwte before. `accumulate` false: this call overwrites the segment.
    """
    n, c, f, heads = ids_N.size, g[G.WIDTH], g[G.FF_WIDTH], g[G.HEADS]
    threshold = g[G.THRESHOLD] if key != 0 else 0
    keep_scale = _keep_scale(g)
    scratch = floats(arena + 4 * g[G.SCRATCH], 1)
    dx, dt, datt = (
        matrix(arena + 4 * g[G.DX], n, c),
        matrix(arena + 4 * g[G.DT], n, c),
        matrix(arena + 4 * g[G.DATT], n, c),
    )
    dqkv, dact = matrix(arena + 4 * g[G.DQKV], n, 3 * c), matrix(arena + 4 * g[G.DACT], n, f)
    stats = floats(arena + 4 * g[G.LNF_STATS], 2 * n)
    dx[:] = f4(0)
    layernorm_backward(
        dt, matrix(arena + 4 * g[G.X_LAST], n, c), _final_vector(g, params, G.LNF_GAIN, c), stats[:n], stats[n:], dx,
        _final_vector(g, segment, G.LNF_GAIN, c), _final_vector(g, segment, G.LNF_BIAS, c), accumulate,
    )  # fmt: skip
    for layer in range(g[G.LAYERS] - 1, -1, -1):
        at = arena + 4 * layer * g[G.LAYER_FLOATS]
        x, ln1, att = (
            matrix(at + 4 * g[G.X], n, c),
            matrix(at + 4 * g[G.LN1], n, c),
            matrix(at + 4 * g[G.ATT], n, c),
        )
        mid, ln2 = matrix(at + 4 * g[G.MID], n, c), matrix(at + 4 * g[G.LN2], n, c)
        qkv, up = matrix(at + 4 * g[G.QKV], n, 3 * c), matrix(at + 4 * g[G.UP], n, f)
        act, lse = matrix(at + 4 * g[G.ACT], n, f), floats(at + 4 * g[G.LSE], heads * n)
        stats = floats(at + 4 * g[G.STATS], 4 * n)

        dy = dx  # the gradient that enters the projections: of the residual, or with the dropout's mask a copy
        if threshold > 0:
            dt[:] = dx
            dropout_sequences(dt, length, _site_key(key, 3 * layer + 3), first_sequence, threshold, keep_scale)
            dy = dt
        linear_backward(
            dy, act, _tensor(g, params, layer, W_DOWN, f, c), dact,
            _tensor(g, segment, layer, W_DOWN, f, c), _vector(g, segment, layer, B_DOWN, c), accumulate,
        )  # fmt: skip
        gelu_backward(up.reshape(n * f), dact.reshape(n * f))
        linear_backward(
            dact, ln2, _tensor(g, params, layer, W_UP, c, f), dt,
            _tensor(g, segment, layer, W_UP, c, f), _vector(g, segment, layer, B_UP, f), accumulate,
        )  # fmt: skip
        layernorm_backward(
            dt, mid, _vector(g, params, layer, G_LN2, c), stats[2 * n : 3 * n], stats[3 * n : 4 * n], dx,
            _vector(g, segment, layer, G_LN2, c), _vector(g, segment, layer, B_LN2, c), accumulate,
        )  # fmt: skip
        dy = dx
        if threshold > 0:
            dt[:] = dx
            dropout_sequences(dt, length, _site_key(key, 3 * layer + 2), first_sequence, threshold, keep_scale)
            dy = dt
        linear_backward(
            dy, att, _tensor(g, params, layer, W_ATT, c, c), datt,
            _tensor(g, segment, layer, W_ATT, c, c), _vector(g, segment, layer, B_ATT, c), accumulate,
        )  # fmt: skip
        attention_backward(
            datt, qkv, att, lse, length, heads, _site_key(key, 3 * layer + 1), first_sequence, threshold, keep_scale,
            scratch, dqkv,
        )  # fmt: skip
        linear_backward(
            dqkv, ln1, _tensor(g, params, layer, W_QKV, c, 3 * c), dt,
            _tensor(g, segment, layer, W_QKV, c, 3 * c), _vector(g, segment, layer, B_QKV, 3 * c), accumulate,
        )  # fmt: skip
        layernorm_backward(
            dt, x, _vector(g, params, layer, G_LN1, c), stats[:n], stats[n : 2 * n], dx,
            _vector(g, segment, layer, G_LN1, c), _vector(g, segment, layer, B_LN1, c), accumulate,
        )  # fmt: skip
        progress[0] += 1
    if threshold > 0:
        dropout_sequences(dx, length, _site_key(key, 0), first_sequence, threshold, keep_scale)
    embedding_backward(
        dx, ids_N, length, _wte(g, segment), matrix(segment + 4 * g[G.WPE], g[G.BLOCK_SIZE], c),
        accumulate,
    )  # fmt: skip


@kernel
def _wte(g, base):
    return matrix(base + 4 * g[G.WTE], g[G.VOCAB], g[G.WIDTH])


@kernel
def _logits_rows(g, arena):
    return matrix(arena + 4 * g[G.LOGITS], g[G.HEAD_ROWS], g[G.VOCAB])


@entry(_d8(_i8, _i8, _i8, _i8, _i8, _i8, _i8, _i8, _d8, _i8, _i8, _i8))
def compute_shard(
    geometry, params, segment, arena, inputs, targets, count, length, scale, key, first_sequence, progress
):
    """The gradient of `count` sequences of `length` tokens, overwriting the segment; returns their summed loss.

    All but scale and the counts are addresses: geometry int64, params/segment/arena float32, inputs/targets int32
    [count, length], progress int64[1], raised at each layer. scale: what a token's loss counts in the gradient
    (1 / tokens of the whole batch). key: dropout key of the step, 0 for none; first_sequence: the number of the
    first sequence in the whole batch.
    """
    state = flush_subnormals()
    g = integers(geometry, G.LAYER_OFFSETS + integers(geometry, G.LAYERS + 1)[G.LAYERS] * _PER_LAYER)
    step_progress = integers(progress, 1)
    loss = 0.0
    at_a_time = g[G.SEQUENCES]
    for first in range(0, count, at_a_time):
        rows = min(at_a_time, count - first) * length
        accumulate = first > 0
        ids = tokens(inputs + 4 * first * length, rows)
        x = forward(g, params, arena, ids, length, types.uint64(key), first_sequence + first, step_progress)
        loss += head_loss_backward(
            x, _wte(g, params), tokens(targets + 4 * first * length, rows), f4(scale), _logits_rows(g, arena),
            matrix(arena + 4 * g[G.DT], rows, g[G.WIDTH]), _wte(g, segment), accumulate,
        )  # fmt: skip
        backward(
            g,
            params,
            segment,
            arena,
            ids,
            length,
            types.uint64(key),
            first_sequence + first,
            accumulate,
            step_progress,
        )
    restore(state)
    return loss


@entry(_d8(_i8, _i8, _i8, _i8, _i8, _i8, _i8))
def evaluate_window(geometry, params, arena, inputs, targets, length, progress):
    """The summed loss of one window of `length` tokens, without dropout. Addresses as in compute_shard."""
    state = flush_subnormals()
    g = integers(geometry, G.LAYER_OFFSETS + integers(geometry, G.LAYERS + 1)[G.LAYERS] * _PER_LAYER)
    x = forward(g, params, arena, tokens(inputs, length), length, types.uint64(0), 0, integers(progress, 1))
    loss = head_loss(x, _wte(g, params), tokens(targets, length), _logits_rows(g, arena))
    restore(state)
    return loss


@entry(_i8(_i8, _i8, _i8, _i8, _i8, _i8, _i8, _i8))
def compute_logits(geometry, params, arena, inputs, length, first_row, logits, progress):
    """Logits of rows first_row..length of one sequence into float32[length - first_row, V]; returns the rows."""
    state = flush_subnormals()
    g = integers(geometry, G.LAYER_OFFSETS + integers(geometry, G.LAYERS + 1)[G.LAYERS] * _PER_LAYER)
    x = forward(g, params, arena, tokens(inputs, length), length, types.uint64(0), 0, integers(progress, 1))
    rows, c, v = length - first_row, g[G.WIDTH], g[G.VOCAB]
    wte = params + 4 * g[G.WTE]
    gemm(False, True, rows, v, c, x[first_row:].ctypes.data, c, wte, c, f4(0), logits, v)
    restore(state)
    return rows
