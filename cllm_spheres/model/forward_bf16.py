"""GPT-2 forward in bfloat16: packed weights and tokens in, activations in the arena out.

B sequences, T tokens padded to 32, N = B * T rows, C channels, F channels of the feed-forward, V vocabulary,
E a head's channels padded to 32. Padding rows hold finite numbers and zero gradients.
"""

from __future__ import annotations

from numba import types

from cllm_spheres.crystal.jit import entry, kernel
from cllm_spheres.crystal.random import combine
from cllm_spheres.kernels import trace as K
from cllm_spheres.kernels.arrays import f4, floats, integers, matrix, tokens
from cllm_spheres.kernels.bf16.attention import attention_forward
from cllm_spheres.kernels.bf16.linear import TO_GELU, TO_RESIDUAL, TO_ROWS, project
from cllm_spheres.kernels.bf16.norm import layernorm_rows
from cllm_spheres.kernels.bf16.tiles import padded
from cllm_spheres.kernels.dropout import dropout_sequences
from cllm_spheres.kernels.progress import FORWARD, advance
from cllm_spheres.kernels.sizes import PROGRESS_WORDS
from cllm_spheres.kernels.trace import mark
from cllm_spheres.model import geometry_bf16 as G
from cllm_spheres.model.layout import B_ATT, B_DOWN, B_LN1, B_LN2, B_QKV, B_UP, G_LN1, G_LN2
from cllm_spheres.model.views import dropout_of, vector
from cllm_spheres.model.views_bf16 import activations, card, head_columns, tensor, weights

_QKV, _ATT, _UP, _DOWN = range(4)  # a layer's packed matrices
_project, _attention_forward = project.external, attention_forward.external
_i8 = types.int64


@kernel
def _address(base, offset):
    """The address of a vector; 0 where the model has none."""
    return base + 4 * offset if offset >= 0 else 0


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
    ids_N, key, progress = tokens(ids, n), types.uint64(dropout_key), integers(progress_at, PROGRESS_WORDS)
    c, heads = g[G.WIDTH], g[G.HEADS]
    t, d, cp, fp = padded(length), c // heads, padded(c), padded(g[G.FF_WIDTH])
    e, h = padded(d), head_columns(g)
    threshold, keep_scale = dropout_of(g[G.THRESHOLD], key)
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
        x, ln1, qkv, lse, att, mid, ln2, up, act, stats_at = activations(g, arena, layer)
        stats = floats(stats_at, 4 * n)
        following = x + g[G.LAYER_BYTES] if layer + 1 < g[G.LAYERS] else arena + g[G.X_LAST]

        gain, bias = vector(params, tensor(g, layer, G_LN1), c), vector(params, tensor(g, layer, B_LN1), c)
        layernorm_rows(matrix(x, n, c), gain, bias, ln1, stats[:n], stats[n : 2 * n], row)
        mark(trace, K.NORM)
        bias = vector(params, tensor(g, layer, B_QKV), 3 * c)
        _spread_bias(bias, d, e, wide_bias)
        w = weights(g, packed, 4 * layer + _QKV)[0]
        b = wide_bias.ctypes.data if bias.size > 0 else 0
        _project(TO_ROWS, n, 3 * h, cp, ln1, w, b, qkv, 0, 3 * h, scratch, 0, 0, 0, 0.0)
        mark(trace, K.QKV)
        _attention_forward(
            qkv, sequences, t, heads, d, types.int64(combine(key, 3 * layer + 1)), first_sequence, length, threshold,
            scratch, att, lse, keep_scale,
        )  # fmt: skip
        mark(trace, K.ATTENTION)
        keys = _site_keys(g, arena, combine(key, 3 * layer + 2), first_sequence, sequences)
        bias = _address(params, tensor(g, layer, B_ATT))
        w = weights(g, packed, 4 * layer + _ATT)[0]
        _project(TO_RESIDUAL, n, c, h, att, w, bias, x, mid, c, scratch, keys, t, threshold, keep_scale)
        mark(trace, K.PROJECTION)

        gain, bias = vector(params, tensor(g, layer, G_LN2), c), vector(params, tensor(g, layer, B_LN2), c)
        layernorm_rows(matrix(mid, n, c), gain, bias, ln2, stats[2 * n : 3 * n], stats[3 * n :], row)
        mark(trace, K.NORM)
        bias = _address(params, tensor(g, layer, B_UP))
        w = weights(g, packed, 4 * layer + _UP)[0]
        _project(TO_GELU, n, g[G.FF_WIDTH], cp, ln2, w, bias, up, act, fp, scratch, 0, 0, 0, 0.0)
        mark(trace, K.UP)
        keys = _site_keys(g, arena, combine(key, 3 * layer + 3), first_sequence, sequences)
        bias = _address(params, tensor(g, layer, B_DOWN))
        w = weights(g, packed, 4 * layer + _DOWN)[0]
        _project(TO_RESIDUAL, n, c, fp, act, w, bias, mid, following, c, scratch, keys, t, threshold, keep_scale)
        mark(trace, K.DOWN)
        advance(progress, FORWARD)
    stats = floats(arena + g[G.LNF_STATS], 2 * n)
    gain, bias = vector(params, g[G.LNF_GAIN], c), vector(params, g[G.LNF_BIAS], c)
    layernorm_rows(matrix(arena + g[G.X_LAST], n, c), gain, bias, arena + g[G.LNF], stats[:n], stats[n:], row)
    mark(trace, K.NORM)
    return 0
