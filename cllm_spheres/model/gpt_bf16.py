"""GPT-2 as a page of kernel calls in bfloat16: packed weights and tokens in, loss and the gradient segment out.

The model of gpt.py. The operands of all matrix products are rounded to bfloat16, and so are the activations that
are kept only as such operands; sums, the residual stream, norms, softmax, loss and gradients are float32.

B sequences, T tokens padded to 32, N = B * T rows, C channels, F channels of the feed-forward, V vocabulary,
E a head's channels padded to 32. Padding rows hold finite numbers and zero gradients.
"""

from __future__ import annotations

from numba import types

from cllm_spheres.crystal.jit import entry, kernel
from cllm_spheres.crystal.random import combine
from cllm_spheres.kernels import trace as K
from cllm_spheres.kernels.arrays import add_rows, f4, floats, integers, matrix, tokens
from cllm_spheres.kernels.bf16.attention import attention_backward, attention_forward
from cllm_spheres.kernels.bf16.head import head_loss, head_loss_backward
from cllm_spheres.kernels.bf16.linear import (
    THROUGH_GELU,
    TO_GELU,
    TO_RESIDUAL,
    TO_ROWS,
    add_form_rows,
    gather_heads,
    multiply,
    project,
    rows_of,
    turn,
)
from cllm_spheres.kernels.bf16.multiply import begin, end
from cllm_spheres.kernels.bf16.norm import layernorm_rows
from cllm_spheres.kernels.bf16.tiles import TILE, padded
from cllm_spheres.kernels.dropout import dropout_sequences
from cllm_spheres.kernels.fpu import flush_subnormals, restore
from cllm_spheres.kernels.layernorm import layernorm_backward
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
    LAYER_TENSORS,
    W_ATT,
    W_DOWN,
    W_QKV,
    W_UP,
)  # fmt: skip
from cllm_spheres.model.packing import card, matrix_at

_PER_LAYER = len(LAYER_TENSORS)
_QKV, _ATT, _UP, _DOWN = range(4)  # a layer's packed matrices
_project, _multiply, _turn = project.external, multiply.external, turn.external
_attention_forward, _attention_backward = attention_forward.external, attention_backward.external
_head_loss, _head_loss_backward = head_loss.external, head_loss_backward.external
_i8, _d8 = types.int64, types.float64


@kernel
def _vector(base, offset, size):
    """A vector of parameters or gradients; of length 0 where the model has none (no biases)."""
    return floats(base + 4 * max(offset, 0), size if offset >= 0 else 0)


@kernel
def _address(base, offset):
    """The address of a vector; 0 where the model has none."""
    return base + 4 * offset if offset >= 0 else 0


@kernel
def _weight_gradient(x_columns, dout_pairs, n, dw, rows, columns, accumulate, scratch):
    """dw[rows, columns] (+)= x.T @ dout."""
    _multiply(rows, columns, n, x_columns, dout_pairs, n // 32 * TILE, dw, 1 if accumulate else 0, scratch)


@kernel
def _tensor(g, layer, which):
    return g[G.LAYER_OFFSETS + layer * _PER_LAYER + which]


@kernel
def _weights(g, packed, number):
    """Addresses of a matrix's two forms: pairs and flipped."""
    m = matrix_at(g, number)
    return packed + g[m + G.M_PAIRS], packed + g[m + G.M_FLIPPED]


@kernel
def _head_columns(g):
    """Columns of all heads together, each head padded."""
    return g[G.HEADS] * padded(g[G.WIDTH] // g[G.HEADS])


@kernel
def _dropout_of(g, key):
    return g[G.THRESHOLD] if key != 0 else 0, f4(1.0 / (1.0 - g[G.THRESHOLD] / 4294967296.0))


@kernel
def _embed(ids_N, wte_VC, wpe_TC, length, t, out_NC):
    """Token and position embeddings; padding rows are zero."""
    for n in range(out_NC.shape[0]):
        out, position = out_NC[n], n % t
        if position < length:
            token, place = wte_VC[ids_N[n]], wpe_TC[position]
            for j in range(out.size):
                out[j] = token[j] + place[j]
        else:
            for j in range(out.size):
                out[j] = f4(0)


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
def _site_keys(g, arena, key, first_sequence, sequences):
    """The dropout keys of each sequence at one place in the model."""
    keys = integers(arena + g[G.KEYS], g[G.SEQUENCES])
    for b in range(sequences):
        keys[b] = types.int64(combine(key, first_sequence + b))
    return keys.ctypes.data


@kernel
def _spread_bias(bias, group, step, out):
    """A bias whose groups (heads) are padded to `step`."""
    for h in range(bias.size // group):
        for j in range(group):
            out[h * step + j] = bias[h * group + j]


@entry(_i8(*[_i8] * 10))
def forward_bf16(geometry, params, packed, arena, ids, n, length, dropout_key, first_sequence, progress_at):
    """All activations of n padded rows into the arena; the final normed rows stand at LNF. Returns 0.

    An entry, so that it is compiled once and not for each of its callers. Arguments as in compute_shard_bf16; ids:
    int32[n]; length: real tokens of a sequence.
    """
    g = card(geometry)
    ids_N, key, progress = tokens(ids, n), types.uint64(dropout_key), integers(progress_at, 1)
    c, heads = g[G.WIDTH], g[G.HEADS]
    t, d, cp, fp = padded(length), c // heads, padded(c), padded(g[G.FF_WIDTH])
    e, h = padded(d), _head_columns(g)
    threshold, keep_scale = _dropout_of(g, key)
    sequences, scratch, trace = n // t, arena + g[G.SCRATCH], g[G.TRACE]
    row = floats(arena + g[G.ROW], cp)
    x = arena + g[G.X]
    _embed(
        ids_N, matrix(params + 4 * g[G.WTE], g[G.VOCAB], c), matrix(params + 4 * g[G.WPE], g[G.BLOCK_SIZE], c), length,
        t, matrix(x, n, c),
    )  # fmt: skip
    if threshold > 0:
        dropout_sequences(matrix(x, n, c), t, combine(key, 0), first_sequence, threshold, keep_scale)
    mark(trace, K.EMBED)
    wide_bias = floats(arena + g[G.WIDE_BIAS], 3 * h)
    wide_bias[:] = f4(0)
    for layer in range(g[G.LAYERS]):
        at = arena + layer * g[G.LAYER_BYTES]
        x, mid, ln1, ln2, qkv, att = (
            at + g[G.X],
            at + g[G.MID],
            at + g[G.LN1],
            at + g[G.LN2],
            at + g[G.QKV],
            at + g[G.ATT],
        )
        up, act = at + g[G.UP], at + g[G.ACT]
        stats = floats(at + g[G.STATS], 4 * n)
        following = x + g[G.LAYER_BYTES] if layer + 1 < g[G.LAYERS] else arena + g[G.X_LAST]

        gain, bias = _vector(params, _tensor(g, layer, G_LN1), c), _vector(params, _tensor(g, layer, B_LN1), c)
        layernorm_rows(matrix(x, n, c), gain, bias, ln1, stats[:n], stats[n : 2 * n], row)
        mark(trace, K.NORM)
        bias = _vector(params, _tensor(g, layer, B_QKV), 3 * c)
        _spread_bias(bias, d, e, wide_bias)
        w = _weights(g, packed, 4 * layer + _QKV)[0]
        b = wide_bias.ctypes.data if bias.size > 0 else 0
        _project(TO_ROWS, n, 3 * h, cp, ln1, w, b, qkv, 0, 3 * h, scratch, 0, 0, 0, 0.0)
        mark(trace, K.QKV)
        _attention_forward(
            qkv, sequences, t, heads, d, types.int64(combine(key, 3 * layer + 1)), first_sequence, length, threshold,
            scratch, att, at + g[G.LSE], keep_scale,
        )  # fmt: skip
        mark(trace, K.ATTENTION)
        keys = _site_keys(g, arena, combine(key, 3 * layer + 2), first_sequence, sequences)
        bias = _address(params, _tensor(g, layer, B_ATT))
        w = _weights(g, packed, 4 * layer + _ATT)[0]
        _project(TO_RESIDUAL, n, c, h, att, w, bias, x, mid, c, scratch, keys, t, threshold, keep_scale)
        mark(trace, K.PROJECTION)

        gain, bias = _vector(params, _tensor(g, layer, G_LN2), c), _vector(params, _tensor(g, layer, B_LN2), c)
        layernorm_rows(matrix(mid, n, c), gain, bias, ln2, stats[2 * n : 3 * n], stats[3 * n :], row)
        mark(trace, K.NORM)
        bias = _address(params, _tensor(g, layer, B_UP))
        w = _weights(g, packed, 4 * layer + _UP)[0]
        _project(TO_GELU, n, g[G.FF_WIDTH], cp, ln2, w, bias, up, act, fp, scratch, 0, 0, 0, 0.0)
        mark(trace, K.UP)
        keys = _site_keys(g, arena, combine(key, 3 * layer + 3), first_sequence, sequences)
        bias = _address(params, _tensor(g, layer, B_DOWN))
        w = _weights(g, packed, 4 * layer + _DOWN)[0]
        _project(TO_RESIDUAL, n, c, fp, act, w, bias, mid, following, c, scratch, keys, t, threshold, keep_scale)
        mark(trace, K.DOWN)
        progress[0] += 1
    stats = floats(arena + g[G.LNF_STATS], 2 * n)
    gain, bias = _vector(params, g[G.LNF_GAIN], c), _vector(params, g[G.LNF_BIAS], c)
    layernorm_rows(matrix(arena + g[G.X_LAST], n, c), gain, bias, arena + g[G.LNF], stats[:n], stats[n:], row)
    mark(trace, K.NORM)
    return 0


_forward = forward_bf16.external


@kernel
def _enter(dx_NC, dt_NC, t, key, first_sequence, threshold, keep_scale, rows, pairs, db_C, accumulate):
    """The residual's gradient as it enters a projection, behind dropout: both forms, and its column sums."""
    n, c = dx_NC.shape
    dy = dx_NC
    if threshold > 0:
        dt_NC[:] = dx_NC
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
    e, h = padded(d), _head_columns(g)
    threshold, keep_scale = _dropout_of(g, key)
    sequences, scratch, trace = n // t, arena + g[G.SCRATCH], g[G.TRACE]
    dx, dt = matrix(arena + g[G.DX], n, c), matrix(arena + g[G.DT], n, c)
    dt_at = arena + g[G.DT]
    rows, pairs, columns, datt = arena + g[G.ROWS], arena + g[G.PAIRS], arena + g[G.COLUMNS], arena + g[G.DATT]
    wide, row_at = arena + g[G.WIDE], arena + g[G.ROW]
    stats = floats(arena + g[G.LNF_STATS], 2 * n)
    dx[:] = f4(0)
    layernorm_backward(
        dt, matrix(arena + g[G.X_LAST], n, c), _vector(params, g[G.LNF_GAIN], c), stats[:n], stats[n:], dx,
        _vector(segment, g[G.LNF_GAIN], c), _vector(segment, g[G.LNF_BIAS], c), accumulate,
    )  # fmt: skip
    mark(trace, K.NORM_BACKWARD)
    for layer in range(g[G.LAYERS] - 1, -1, -1):
        at = arena + layer * g[G.LAYER_BYTES]
        x, mid, ln1, ln2, qkv, att = (
            at + g[G.X],
            at + g[G.MID],
            at + g[G.LN1],
            at + g[G.LN2],
            at + g[G.QKV],
            at + g[G.ATT],
        )
        up, act = at + g[G.UP], at + g[G.ACT]
        stats = floats(at + g[G.STATS], 4 * n)

        _enter(dx, dt, t, combine(key, 3 * layer + 3), first_sequence, threshold, keep_scale, rows, pairs,
               _vector(segment, _tensor(g, layer, B_DOWN), c), accumulate)  # fmt: skip
        mark(trace, K.RESIDUAL)
        _turn(act, n, fp, columns, 1)
        mark(trace, K.REARRANGE)
        _weight_gradient(columns, pairs, n, segment + 4 * _tensor(g, layer, W_DOWN), f, c, accumulate, scratch)
        mark(trace, K.DW)
        w = _weights(g, packed, 4 * layer + _DOWN)[1]
        db = _vector(segment, _tensor(g, layer, B_UP), f)
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
        _weight_gradient(columns, pairs, n, segment + 4 * _tensor(g, layer, W_UP), c, f, accumulate, scratch)
        mark(trace, K.DW)
        w = _weights(g, packed, 4 * layer + _UP)[1]
        _multiply(n, c, fp, act, w, fp // 32 * TILE, dt_at, 0, scratch)
        mark(trace, K.DX)
        layernorm_backward(
            dt, matrix(mid, n, c), _vector(params, _tensor(g, layer, G_LN2), c), stats[2 * n : 3 * n], stats[3 * n :],
            dx, _vector(segment, _tensor(g, layer, G_LN2), c), _vector(segment, _tensor(g, layer, B_LN2), c),
            accumulate,
        )  # fmt: skip
        mark(trace, K.NORM_BACKWARD)

        _enter(dx, dt, t, combine(key, 3 * layer + 2), first_sequence, threshold, keep_scale, rows, pairs,
               _vector(segment, _tensor(g, layer, B_ATT), c), accumulate)  # fmt: skip
        mark(trace, K.RESIDUAL)
        _turn(att, n, h, columns, 1)
        mark(trace, K.REARRANGE)
        dw = segment + 4 * _tensor(g, layer, W_ATT)
        if d == e:
            _weight_gradient(columns, pairs, n, dw, c, c, accumulate, scratch)
        else:
            _weight_gradient(columns, pairs, n, wide, h, c, False, scratch)
            gather_heads(wide, c, d, e, c, c, matrix(dw, c, c), accumulate)
        mark(trace, K.DW)
        w = _weights(g, packed, 4 * layer + _ATT)[1]
        _project(TO_ROWS, n, h, cp, rows, w, 0, datt, 0, h, scratch, 0, 0, 0, 0.0)
        mark(trace, K.DX)
        _attention_backward(
            datt, qkv, att, at + g[G.LSE], sequences, t, heads, d, types.int64(combine(key, 3 * layer + 1)),
            first_sequence, length, threshold, scratch, rows, keep_scale,
        )  # fmt: skip
        mark(trace, K.ATTENTION_BACKWARD)
        db = _vector(segment, _tensor(g, layer, B_QKV), 3 * c)
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
        dw = segment + 4 * _tensor(g, layer, W_QKV)
        if d == e:
            _weight_gradient(columns, pairs, n, dw, c, 3 * c, accumulate, scratch)
        else:
            _weight_gradient(columns, pairs, n, wide, c, 3 * h, False, scratch)
            gather_heads(wide, 3 * h, c, c, d, e, matrix(dw, c, 3 * c), accumulate)
        mark(trace, K.DW)
        w = _weights(g, packed, 4 * layer + _QKV)[1]
        _multiply(n, c, 3 * h, rows, w, 3 * h // 32 * TILE, dt_at, 0, scratch)
        mark(trace, K.DX)
        layernorm_backward(
            dt, matrix(x, n, c), _vector(params, _tensor(g, layer, G_LN1), c), stats[:n], stats[n : 2 * n],
            dx, _vector(segment, _tensor(g, layer, G_LN1), c), _vector(segment, _tensor(g, layer, B_LN1), c),
            accumulate,
        )  # fmt: skip
        mark(trace, K.NORM_BACKWARD)
        progress[0] += 1
    if threshold > 0:
        dropout_sequences(dx, t, combine(key, 0), first_sequence, threshold, keep_scale)
    _embed_backward(
        dx, ids_N, length, t, matrix(segment + 4 * g[G.WTE], g[G.VOCAB], c),
        matrix(segment + 4 * g[G.WPE], g[G.BLOCK_SIZE], c), accumulate,
    )  # fmt: skip
    mark(trace, K.EMBED_BACKWARD)


@kernel
def _pad_tokens(source, sequences, length, filler, out_N):
    """Rows of `length` tokens -> rows of padded length; returns them."""
    t = padded(length)
    given = tokens(source, sequences * length)
    for n in range(sequences * t):
        b, position = n // t, n % t
        out_N[n] = given[b * length + position] if position < length else filler
    return out_N[: sequences * t]


@entry(_d8(_i8, _i8, _i8, _i8, _i8, _i8, _i8, _i8, _i8, _d8, _i8, _i8, _i8))
def compute_shard_bf16(
    geometry, params, packed, segment, arena, inputs, targets, count, length, scale, key, first_sequence, progress
):
    """The gradient of `count` sequences of `length` tokens, overwriting the segment; returns their summed loss.

    As compute_shard in gpt.py; packed: address of the weights as pack_unit_bf16 leaves them.
    """
    state = flush_subnormals()
    g = card(geometry)
    begin(arena + g[G.SCRATCH])
    c, v = g[G.WIDTH], g[G.VOCAB]
    cp, t = padded(c), padded(length)
    layers_done, dropout_key = integers(progress, 1), types.uint64(key)
    loss = 0.0
    at_a_time = g[G.SEQUENCES]
    room = at_a_time * padded(g[G.BLOCK_SIZE])
    x, x_pairs = arena + g[G.LNF], arena + g[G.X_PAIRS]
    wte_pairs, wte_flipped = _weights(g, packed, 4 * g[G.LAYERS])
    for first in range(0, count, at_a_time):
        sequences = min(at_a_time, count - first)
        n = sequences * t
        accumulate = first > 0
        ids = _pad_tokens(inputs + 4 * first * length, sequences, length, 0, tokens(arena + g[G.IDS], room))
        wanted = _pad_tokens(targets + 4 * first * length, sequences, length, -1, tokens(arena + g[G.TARGETS], room))
        _forward(geometry, params, packed, arena, ids.ctypes.data, n, length, key, first_sequence + first, progress)
        _turn(x, n, cp, x_pairs, 0)
        mark(g[G.TRACE], K.REARRANGE)
        # The token embedding stands in the card as [V, C]: logits take it flipped, dx takes it in pairs.
        loss += _head_loss_backward(
            x, x_pairs, c, wte_flipped, wte_pairs, v, n, wanted.ctypes.data, arena + g[G.HEAD_STATS],
            arena + g[G.SCRATCH], arena + g[G.LOGITS], arena + g[G.TURNED], arena + g[G.DT],
            segment + 4 * g[G.WTE], 1 if accumulate else 0, scale,
        )  # fmt: skip
        mark(g[G.TRACE], K.HEAD)
        backward(
            g, params, packed, segment, arena, ids, length, dropout_key, first_sequence + first, accumulate, layers_done
        )
    end()
    restore(state)
    return loss


@entry(_d8(_i8, _i8, _i8, _i8, _i8, _i8, _i8, _i8))
def evaluate_window_bf16(geometry, params, packed, arena, inputs, targets, length, progress):
    """The summed loss of one window of `length` tokens, without dropout. Addresses as in compute_shard_bf16."""
    state = flush_subnormals()
    g = card(geometry)
    begin(arena + g[G.SCRATCH])
    n = padded(length)
    ids = _pad_tokens(inputs, 1, length, 0, tokens(arena + g[G.IDS], n))
    wanted = _pad_tokens(targets, 1, length, -1, tokens(arena + g[G.TARGETS], n))
    _forward(geometry, params, packed, arena, ids.ctypes.data, n, length, 0, 0, progress)
    loss = _head_loss(
        arena + g[G.LNF], g[G.WIDTH], _weights(g, packed, 4 * g[G.LAYERS])[1], g[G.VOCAB], n, wanted.ctypes.data,
        arena + g[G.HEAD_STATS], arena + g[G.SCRATCH],
    )  # fmt: skip
    end()
    restore(state)
    return loss
