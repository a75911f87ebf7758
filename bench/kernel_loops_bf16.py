"""A bfloat16 kernel and its arguments -> the same call many times, in jitted code, with the tile registers taken.

As kernel_loops.py; importing this compiles bfloat16, which a CPU without it cannot. Forms are addresses.
"""

from __future__ import annotations

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels.bf16.attention import attention_backward, attention_forward
from cllm_spheres.kernels.bf16.head import head_loss_backward
from cllm_spheres.kernels.bf16.linear import multiply, project
from cllm_spheres.kernels.bf16.multiply import begin, block_row, end
from cllm_spheres.kernels.bf16.norm import layernorm_rows
from cllm_spheres.kernels.bf16.sizes import CHUNK
from cllm_spheres.kernels.bf16.tiles import TILE, padded
from cllm_spheres.kernels.fpu import flush_subnormals, restore
from cllm_spheres.model.ops.bf16_packing import pack_unit

_multiply, _project, _head_loss_backward = multiply.external, project.external, head_loss_backward.external
_attention_forward, _attention_backward = attention_forward.external, attention_backward.external
_pack_unit = pack_unit.external


@kernel
def repeat_multiply(times, m, n, inner, a, b, out, scratch):
    """out[m, n] = a @ b, float32; inner: padded."""
    state = flush_subnormals()
    begin(scratch)
    for _ in range(times):
        _multiply(m, n, inner, a, b, inner // 32 * TILE, out, 0, scratch)
    end()
    restore(state)


@kernel
def repeat_project(times, ending, m, n, inner, a, b, bias, first, second, columns, scratch, keys, length):
    """A product and its ending, without dropout."""
    state = flush_subnormals()
    begin(scratch)
    for _ in range(times):
        _project(ending, m, n, inner, a, b, bias, first, second, columns, scratch, keys, length, 0, 0.0)
    end()
    restore(state)


@kernel
def repeat_head_logits(times, n, inner, vocabulary, x, wte_flipped, scratch):
    """The logits as the head computes them: a chunk of columns of 32 rows at a time, none kept."""
    state = flush_subnormals()
    begin(scratch)
    step = inner // 32 * TILE
    for _ in range(times):
        for first in range(0, vocabulary, CHUNK):
            blocks = (min(CHUNK, vocabulary - first) + 31) // 32
            for row in range(0, n, 32):
                block_row(inner, x + row // 16 * step, step, wte_flipped, first // 32, blocks, scratch, CHUNK)
    end()
    restore(state)


@kernel
def repeat_head_dx(times, n, width, vocabulary, form, wte_pairs, dx, scratch):
    """The gradient of the head's input, a chunk of the vocabulary at a time; form: one chunk of dlogits."""
    state = flush_subnormals()
    begin(scratch)
    strip = padded(vocabulary) // 32 * TILE
    for _ in range(times):
        for first in range(0, vocabulary, CHUNK):
            columns = padded(min(CHUNK, vocabulary - first))
            _multiply(
                n, width, columns, form, wte_pairs + first // 32 * TILE, strip, dx, 1 if first > 0 else 0, scratch
            )  # fmt: skip
    end()
    restore(state)


@kernel
def repeat_head_dw(times, n, width, vocabulary, turned, x_pairs, dwte, scratch):
    """The gradient of the token embedding, a chunk of the vocabulary at a time; turned: one chunk of dlogits."""
    state = flush_subnormals()
    begin(scratch)
    for _ in range(times):
        for first in range(0, vocabulary, CHUNK):
            count = min(CHUNK, vocabulary - first)
            _multiply(
                count, width, n, turned, x_pairs, n // 32 * TILE, dwte + 4 * first * width, 0, scratch
            )  # fmt: skip
    end()
    restore(state)


@kernel
def repeat_head(times, x, x_pairs, width, wte_flipped, wte_pairs, vocabulary, n, targets, stats, scratch, kept, form,
                turned, dx, dwte, scale):  # fmt: skip
    """The whole head, forward and backward; the last loss."""
    state = flush_subnormals()
    begin(scratch)
    loss = 0.0
    for _ in range(times):
        loss = _head_loss_backward(
            x, x_pairs, width, wte_flipped, wte_pairs, vocabulary, n, targets, 0, stats, scratch, kept, form,
            turned, dx, dwte, 0, scale,
        )  # fmt: skip
    end()
    restore(state)
    return loss


@kernel
def repeat_attention_forward(times, qkv, sequences, t, heads, d, length, scratch, out, lse):
    """Causal attention without dropout; t: padded."""
    state = flush_subnormals()
    begin(scratch)
    for _ in range(times):
        _attention_forward(qkv, sequences, t, heads, d, 0, 0, length, 0, scratch, out, lse, 1.0)
    end()
    restore(state)


@kernel
def repeat_attention_backward(times, dout, qkv, out, lse, sequences, t, heads, d, length, scratch, dqkv):
    """Its gradients."""
    state = flush_subnormals()
    begin(scratch)
    for _ in range(times):
        _attention_backward(dout, qkv, out, lse, sequences, t, heads, d, 0, 0, length, 0, scratch, dqkv, 1.0)
    end()
    restore(state)


@kernel
def repeat_layernorm_rows(times, x_NC, gain_C, bias_C, form, mean_N, rstd_N, row_P):
    """Layer normalisation into tiles."""
    state = flush_subnormals()
    for _ in range(times):
        layernorm_rows(x_NC, gain_C, bias_C, form, mean_N, rstd_N, row_P)
    restore(state)


@kernel
def repeat_pack(times, table, params, packed, units):
    """Both forms of all weights."""
    for _ in range(times):
        for unit in range(units):
            _pack_unit(table, params, 0, packed, unit)
