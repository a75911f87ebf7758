"""GPT-2 as a page of kernel calls in bfloat16: packed weights and tokens in, loss and the gradient segment out.

The model of gpt.py. The operands of all matrix products are rounded to bfloat16, and so are the activations that
are kept only as such operands; sums, the residual stream, norms, softmax, loss and gradients are float32.

B sequences, T tokens padded to 32, N = B * T rows, C channels, F channels of the feed-forward, V vocabulary,
E a head's channels padded to 32. Padding rows hold finite numbers and zero gradients.
"""

from __future__ import annotations

from numba import types

from cllm_spheres.crystal.jit import entry, kernel
from cllm_spheres.kernels import trace as K
from cllm_spheres.kernels.arrays import doubles, integers, tokens
from cllm_spheres.kernels.bf16.head import head_loss, head_loss_backward
from cllm_spheres.kernels.bf16.linear import turn
from cllm_spheres.kernels.bf16.multiply import begin, end
from cllm_spheres.kernels.bf16.tiles import padded
from cllm_spheres.kernels.fpu import flush_subnormals, restore
from cllm_spheres.kernels.sizes import PROGRESS_WORDS
from cllm_spheres.kernels.trace import mark
from cllm_spheres.model import geometry_bf16 as G
from cllm_spheres.model.backward_bf16 import backward
from cllm_spheres.model.forward_bf16 import forward_bf16
from cllm_spheres.model.views_bf16 import card, weights

_forward, _turn = forward_bf16.external, turn.external
_head_loss, _head_loss_backward = head_loss.external, head_loss_backward.external
_i8, _d8 = types.int64, types.float64


@kernel
def _pad_tokens(source, sequences, length, filler, out_N):
    """Rows of `length` tokens -> rows of padded length; returns them."""
    t = padded(length)
    given = tokens(source, sequences * length)
    for n in range(sequences * t):
        b, position = n // t, n % t
        out_N[n] = given[b * length + position] if position < length else filler
    return out_N[: sequences * t]


@entry(_d8(*[_i8] * 9, _d8, *[_i8] * 5))
def compute_shard_bf16(
    geometry, params, packed, segment, arena, inputs, targets, count, length, scale, key, first_sequence, soft,
    cross_entropy, progress,
):  # fmt: skip
    """The gradient of `count` sequences of `length` tokens, overwriting the segment; returns their summed loss.

    As compute_shard in gpt.py; packed: address of the weights as pack_unit_bf16 leaves them.
    """
    state = flush_subnormals()
    g = card(geometry)
    begin(arena + g[G.SCRATCH])
    c, v = g[G.WIDTH], g[G.VOCAB]
    cp, t = padded(c), padded(length)
    layers_done, dropout_key = integers(progress, PROGRESS_WORDS), types.uint64(key)
    loss = excess = 0.0
    at_a_time = g[G.SEQUENCES]
    room = at_a_time * padded(g[G.BLOCK_SIZE])
    x, x_pairs, kept = arena + g[G.LNF], arena + g[G.X_PAIRS], arena + g[G.KEPT] if g[G.KEPT] > 0 else 0
    wte_pairs, wte_flipped = weights(g, packed, 4 * g[G.LAYERS])
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
            x, x_pairs, c, wte_flipped, wte_pairs, v, n, wanted.ctypes.data, soft,
            arena + g[G.HEAD_STATS], arena + g[G.SCRATCH], kept, arena + g[G.LOGITS], arena + g[G.TURNED],
            arena + g[G.DT], segment + 4 * g[G.WTE], 1 if accumulate else 0, scale,
        )  # fmt: skip
        excess += doubles(arena + g[G.HEAD_STATS] + 20 * n, 1)[0]
        mark(g[G.TRACE], K.HEAD)
        backward(
            g, params, packed, segment, arena, ids, length, dropout_key, first_sequence + first, accumulate, layers_done
        )
    end()
    restore(state)
    if cross_entropy != 0:
        doubles(cross_entropy, 1)[0] = loss
    return loss + excess


@entry(_d8(*[_i8] * 10))
def evaluate_window_bf16(geometry, params, packed, arena, inputs, targets, length, first, correct, progress):
    """The summed loss of rows first..length of one window of `length` tokens, without dropout.

    Addresses as in compute_shard_bf16; correct: as in evaluate_window in gpt.py.
    """
    state = flush_subnormals()
    g = card(geometry)
    begin(arena + g[G.SCRATCH])
    n = padded(length)
    ids = _pad_tokens(inputs, 1, length, 0, tokens(arena + g[G.IDS], n))
    wanted = _pad_tokens(targets, 1, length, -1, tokens(arena + g[G.TARGETS], n))
    for t in range(first):
        wanted[t] = -1
    _forward(geometry, params, packed, arena, ids.ctypes.data, n, length, 0, 0, progress)
    skipped = first // 32 * 32  # rows of whole tiles that are not asked for
    loss = _head_loss(
        arena + g[G.LNF] + 2 * skipped * padded(g[G.WIDTH]), g[G.WIDTH], weights(g, packed, 4 * g[G.LAYERS])[1],
        g[G.VOCAB], n - skipped, wanted.ctypes.data + 4 * skipped, arena + g[G.HEAD_STATS], arena + g[G.SCRATCH],
        correct,
    )  # fmt: skip
    end()
    restore(state)
    return loss
