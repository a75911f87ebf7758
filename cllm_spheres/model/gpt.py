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
from cllm_spheres.kernels import trace as K
from cllm_spheres.kernels.arrays import copy_floats, doubles, f4, floats, integers, matrix, tokens
from cllm_spheres.kernels.attention import attention_backward, attention_forward
from cllm_spheres.kernels.cross_entropy import head_loss, head_loss_backward
from cllm_spheres.kernels.dropout import dropout_sequences
from cllm_spheres.kernels.embedding import embedding_backward, embedding_forward
from cllm_spheres.kernels.fpu import flush_subnormals, restore
from cllm_spheres.kernels.gelu import gelu_backward, gelu_forward
from cllm_spheres.kernels.layernorm import layernorm_backward, layernorm_forward
from cllm_spheres.kernels.linear import linear_backward, linear_forward, linear_residual_forward
from cllm_spheres.kernels.products import gemm
from cllm_spheres.kernels.progress import BACKWARD, FORWARD, advance
from cllm_spheres.kernels.sizes import PROGRESS_WORDS
from cllm_spheres.kernels.trace import mark
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
from cllm_spheres.model.views import dropout_of, vector

_PER_LAYER = len(LAYER_TENSORS)
_i8, _d8 = types.int64, types.float64


@kernel
def _layer(g, base, layer):
    """A layer's tensors in a buffer of parameters or gradients, in the order in which the forward uses them."""
    c, f, at = g[G.WIDTH], g[G.FF_WIDTH], G.LAYER_OFFSETS + layer * _PER_LAYER
    return (
        vector(base, g[at + G_LN1], c), vector(base, g[at + B_LN1], c),
        matrix(base + 4 * g[at + W_QKV], c, 3 * c), vector(base, g[at + B_QKV], 3 * c),
        matrix(base + 4 * g[at + W_ATT], c, c), vector(base, g[at + B_ATT], c),
        vector(base, g[at + G_LN2], c), vector(base, g[at + B_LN2], c),
        matrix(base + 4 * g[at + W_UP], c, f), vector(base, g[at + B_UP], f),
        matrix(base + 4 * g[at + W_DOWN], f, c), vector(base, g[at + B_DOWN], c),
    )  # fmt: skip


@kernel
def _ends(g, base):
    """The tensors around the layers: token and position embeddings, gain and bias of the final norm."""
    c = g[G.WIDTH]
    return (
        matrix(base + 4 * g[G.WTE], g[G.VOCAB], c), matrix(base + 4 * g[G.WPE], g[G.BLOCK_SIZE], c),
        vector(base, g[G.LNF_GAIN], c), vector(base, g[G.LNF_BIAS], c),
    )  # fmt: skip


@kernel
def _activations(g, arena, layer, n):
    """A layer's part of the arena, for n rows: what the forward leaves and the backward reads."""
    c, f, at = g[G.WIDTH], g[G.FF_WIDTH], arena + 4 * layer * g[G.LAYER_FLOATS]
    stats = floats(at + 4 * g[G.STATS], 4 * n)
    return (
        matrix(at + 4 * g[G.X], n, c), matrix(at + 4 * g[G.LN1], n, c), matrix(at + 4 * g[G.QKV], n, 3 * c),
        floats(at + 4 * g[G.LSE], n * g[G.HEADS]), matrix(at + 4 * g[G.ATT], n, c), matrix(at + 4 * g[G.MID], n, c),
        matrix(at + 4 * g[G.LN2], n, c), matrix(at + 4 * g[G.UP], n, f), matrix(at + 4 * g[G.ACT], n, f),
        stats[:n], stats[n : 2 * n], stats[2 * n : 3 * n], stats[3 * n :],
    )  # fmt: skip


@kernel
def _shared(g, arena, which, n, columns):
    """A matrix of n rows in the part of the arena that all layers share."""
    return matrix(arena + 4 * g[which], n, columns)


@kernel
def _logits(g, arena):
    """Room for the logits of a few rows."""
    return matrix(arena + 4 * g[G.LOGITS], g[G.HEAD_ROWS], g[G.VOCAB])


@kernel
def _add_projection(x, w, b, residual, out, products, length, key, first_sequence, threshold, keep_scale):
    """out = residual + dropout(x @ w + b)."""
    if threshold == 0:
        linear_residual_forward(x, w, b, residual, out, products)
        return
    linear_forward(x, w, b, out, products)
    dropout_sequences(out, length, key, first_sequence, threshold, keep_scale)
    for n in range(out.shape[0]):
        row, old = out[n], residual[n]
        for j in range(row.size):
            row[j] += old[j]


@kernel
def _through_dropout(dx, dt, length, key, first_sequence, threshold, keep_scale):
    """The gradient that enters a projection: that of the residual, or with dropout its masked copy in dt."""
    if threshold == 0:
        return dx
    copy_floats(dx.ctypes.data, dt.ctypes.data, dx.size)
    dropout_sequences(dt, length, key, first_sequence, threshold, keep_scale)
    return dt


@kernel
def _geometry(address):
    """The geometry's array; its length depends on the number of layers, which stands in it."""
    layers = integers(address, G.LAYERS + 1)[G.LAYERS]
    return integers(address, G.LAYER_OFFSETS + layers * _PER_LAYER)


@entry(_i8(*[_i8] * 9))
def forward(geometry, params, arena, ids, n, length, dropout_key, first_sequence, progress_at):
    """All activations of n rows into the arena; the final normed rows stand at LNF. Returns 0.

    An entry, so that it is compiled once and not for each of its callers. Arguments as in compute_shard; ids: int32[n].
    """
    g = _geometry(geometry)
    ids_N, key, progress = tokens(ids, n), types.uint64(dropout_key), integers(progress_at, PROGRESS_WORDS)
    c, heads = g[G.WIDTH], g[G.HEADS]
    threshold, keep_scale = dropout_of(g[G.THRESHOLD], key)
    wte, wpe, gain, bias = _ends(g, params)
    scratch, products = floats(arena + 4 * g[G.SCRATCH], 1), arena + 4 * g[G.PRODUCTS]
    x_last, lnf = _shared(g, arena, G.X_LAST, n, c), _shared(g, arena, G.LNF, n, c)
    first = _activations(g, arena, 0, n)[0]
    embedding_forward(ids_N, wte, wpe, length, first)
    if threshold > 0:
        dropout_sequences(first, length, combine(key, 0), first_sequence, threshold, keep_scale)
    mark(g[G.TRACE], K.EMBED)
    for layer in range(g[G.LAYERS]):
        x, ln1, qkv, lse, att, mid, ln2, up, act, mean1, rstd1, mean2, rstd2 = _activations(g, arena, layer, n)
        gain1, bias1, w_qkv, b_qkv, w_att, b_att, gain2, bias2, w_up, b_up, w_down, b_down = _layer(g, params, layer)
        following = _activations(g, arena, layer + 1, n)[0] if layer + 1 < g[G.LAYERS] else x_last
        key_att, key_mid, key_out = (
            combine(key, 3 * layer + 1),
            combine(key, 3 * layer + 2),
            combine(key, 3 * layer + 3),
        )

        layernorm_forward(x, gain1, bias1, ln1, mean1, rstd1)
        mark(g[G.TRACE], K.NORM)
        linear_forward(ln1, w_qkv, b_qkv, qkv, products)
        mark(g[G.TRACE], K.QKV)
        attention_forward(
            qkv, length, heads, key_att, first_sequence, threshold, keep_scale, scratch, att, lse
        )  # fmt: skip
        mark(g[G.TRACE], K.ATTENTION)
        _add_projection(att, w_att, b_att, x, mid, products, length, key_mid, first_sequence, threshold, keep_scale)
        mark(g[G.TRACE], K.PROJECTION)
        layernorm_forward(mid, gain2, bias2, ln2, mean2, rstd2)
        mark(g[G.TRACE], K.NORM)
        linear_forward(ln2, w_up, b_up, up, products)
        mark(g[G.TRACE], K.UP)
        gelu_forward(up.reshape(up.size), act.reshape(act.size))
        mark(g[G.TRACE], K.GELU)
        _add_projection(
            act, w_down, b_down, mid, following, products, length, key_out, first_sequence, threshold, keep_scale
        )  # fmt: skip
        mark(g[G.TRACE], K.DOWN)
        advance(progress, FORWARD)
    stats = floats(arena + 4 * g[G.LNF_STATS], 2 * n)
    layernorm_forward(x_last, gain, bias, lnf, stats[:n], stats[n:])
    mark(g[G.TRACE], K.NORM)
    return 0


_forward = forward.external


@kernel
def backward(g, params, segment, arena, ids_N, length, key, first_sequence, accumulate, progress):
    """Gradients of everything below the final norm's output, whose gradient stands in the arena at DT.

    The head has written its share of dwte before. `accumulate` false: this call overwrites the segment.
    """
    n, c, f, heads = ids_N.size, g[G.WIDTH], g[G.FF_WIDTH], g[G.HEADS]
    threshold, keep_scale = dropout_of(g[G.THRESHOLD], key)
    gain = _ends(g, params)[2]
    dwte, dwpe, dgain, dbias = _ends(g, segment)
    scratch, products = floats(arena + 4 * g[G.SCRATCH], 1), arena + 4 * g[G.PRODUCTS]
    dx, dt, datt = _shared(g, arena, G.DX, n, c), _shared(g, arena, G.DT, n, c), _shared(g, arena, G.DATT, n, c)
    dqkv, dact = _shared(g, arena, G.DQKV, n, 3 * c), _shared(g, arena, G.DACT, n, f)
    stats = floats(arena + 4 * g[G.LNF_STATS], 2 * n)
    x_last = _shared(g, arena, G.X_LAST, n, c)
    dx[:] = f4(0)
    layernorm_backward(dt, x_last, gain, stats[:n], stats[n:], dx, dgain, dbias, accumulate)
    mark(g[G.TRACE], K.NORM_BACKWARD)
    for layer in range(g[G.LAYERS] - 1, -1, -1):
        x, ln1, qkv, lse, att, mid, ln2, up, act, mean1, rstd1, mean2, rstd2 = _activations(g, arena, layer, n)
        gain1, _1, w_qkv, _2, w_att, _3, gain2, _4, w_up, _5, w_down, _6 = _layer(g, params, layer)
        (dgain1, dbias1, dw_qkv, db_qkv, dw_att, db_att, dgain2, dbias2, dw_up, db_up, dw_down, db_down) = _layer(
            g, segment, layer
        )
        key_att, key_mid, key_out = (
            combine(key, 3 * layer + 1),
            combine(key, 3 * layer + 2),
            combine(key, 3 * layer + 3),
        )

        dy = _through_dropout(dx, dt, length, key_out, first_sequence, threshold, keep_scale)
        linear_backward(dy, act, w_down, dact, dw_down, db_down, accumulate, products)
        mark(g[G.TRACE], K.LINEAR_BACKWARD)
        gelu_backward(up.reshape(up.size), dact.reshape(dact.size))
        mark(g[G.TRACE], K.GELU_BACKWARD)
        linear_backward(dact, ln2, w_up, dt, dw_up, db_up, accumulate, products)
        mark(g[G.TRACE], K.LINEAR_BACKWARD)
        layernorm_backward(dt, mid, gain2, mean2, rstd2, dx, dgain2, dbias2, accumulate)
        mark(g[G.TRACE], K.NORM_BACKWARD)
        dy = _through_dropout(dx, dt, length, key_mid, first_sequence, threshold, keep_scale)
        linear_backward(dy, att, w_att, datt, dw_att, db_att, accumulate, products)
        mark(g[G.TRACE], K.LINEAR_BACKWARD)
        attention_backward(
            datt, qkv, att, lse, length, heads, key_att, first_sequence, threshold, keep_scale, scratch, dqkv
        )
        mark(g[G.TRACE], K.ATTENTION_BACKWARD)
        linear_backward(dqkv, ln1, w_qkv, dt, dw_qkv, db_qkv, accumulate, products)
        mark(g[G.TRACE], K.LINEAR_BACKWARD)
        layernorm_backward(dt, x, gain1, mean1, rstd1, dx, dgain1, dbias1, accumulate)
        mark(g[G.TRACE], K.NORM_BACKWARD)
        advance(progress, BACKWARD)
    if threshold > 0:
        dropout_sequences(dx, length, combine(key, 0), first_sequence, threshold, keep_scale)
    embedding_backward(dx, ids_N, length, dwte, dwpe, accumulate)
    mark(g[G.TRACE], K.EMBED_BACKWARD)


@entry(_d8(*[_i8] * 9, _d8, *[_i8] * 5))
def compute_shard(
    geometry, params, packed, segment, arena, inputs, targets, count, length, scale, key, first_sequence, soft,
    cross_entropy, progress,
):  # fmt: skip
    """The gradient of `count` sequences of `length` tokens, overwriting the segment; returns their summed loss.

    All but scale and the counts are addresses: geometry int64, params/segment/arena float32, packed what
    `pack_unit` made of the weights (float32 kernels do not read it), inputs/targets int32 [count, length],
    progress int64[PROGRESS_WORDS], raised at each layer. scale: what a token's loss counts in the gradient
    (1 / tokens of the whole batch). key: dropout key of the step, 0 for none; first_sequence: the number of the
    first sequence in the whole batch. soft: a card of kernels/soft_targets.py, 0 for none. cross_entropy: of a float64,
    which becomes the summed plain cross-entropy, the loss itself where there are no soft targets; or 0.
    """
    state = flush_subnormals()
    g = _geometry(geometry)
    wte, dwte = _ends(g, params)[0], _ends(g, segment)[0]
    layers_done, dropout_key = integers(progress, PROGRESS_WORDS), types.uint64(key)
    loss = excess = 0.0
    at_a_time = g[G.SEQUENCES]
    for first in range(0, count, at_a_time):
        rows = min(at_a_time, count - first) * length
        accumulate = first > 0
        ids = tokens(inputs + 4 * first * length, rows)
        _forward(geometry, params, arena, ids.ctypes.data, rows, length, key, first_sequence + first, progress)
        x = _shared(g, arena, G.LNF, rows, g[G.WIDTH])
        of_head = head_loss_backward(
            x, wte, tokens(targets + 4 * first * length, rows), f4(scale), soft, _logits(g, arena),
            _shared(g, arena, G.DT, rows, g[G.WIDTH]), dwte, accumulate, arena + 4 * g[G.PRODUCTS],
        )  # fmt: skip
        loss, excess = loss + of_head[0], excess + of_head[1]
        mark(g[G.TRACE], K.HEAD)
        backward(
            g, params, segment, arena, ids, length, dropout_key, first_sequence + first, accumulate, layers_done
        )  # fmt: skip
    restore(state)
    if cross_entropy != 0:
        doubles(cross_entropy, 1)[0] = loss
    return loss + excess


@entry(_d8(*[_i8] * 10))
def evaluate_window(geometry, params, packed, arena, inputs, targets, length, first, correct, progress):
    """The summed loss of rows first..length of one window of `length` tokens, without dropout.

    Addresses as in compute_shard; correct: of an int64, which becomes the number of these rows whose target is the
    likeliest token.
    """
    state = flush_subnormals()
    g = _geometry(geometry)
    _forward(geometry, params, arena, inputs, length, length, 0, 0, progress)
    x = _shared(g, arena, G.LNF, length, g[G.WIDTH])[first:]
    products = arena + 4 * g[G.PRODUCTS]
    loss = head_loss(
        x, _ends(g, params)[0], tokens(targets, length)[first:], _logits(g, arena), products, integers(correct, 1)
    )
    restore(state)
    return loss


@entry(_i8(_i8, _i8, _i8, _i8, _i8, _i8, _i8, _i8))
def compute_logits(geometry, params, arena, inputs, length, first_row, logits, progress):
    """Logits of rows first_row..length of one sequence into float32[length - first_row, V]; returns the rows."""
    state = flush_subnormals()
    g = _geometry(geometry)
    _forward(geometry, params, arena, inputs, length, length, 0, 0, progress)
    x = _shared(g, arena, G.LNF, length, g[G.WIDTH])
    rows, c, v = length - first_row, g[G.WIDTH], g[G.VOCAB]
    wte, products = params + 4 * g[G.WTE], arena + 4 * g[G.PRODUCTS]
    gemm(False, True, rows, v, c, x[first_row:].ctypes.data, c, wte, c, 0, 0, 0, logits, v, products)
    restore(state)
    return rows
