"""The ops in bfloat16: the forward pass and the head. Those of the backward pass stand in bf16_backward.py.

N rows, of which each sequence has its tokens and what pads them to a multiple of 32; C channels. "Rows" are rows form
(kernels/bf16/tiles.py), whose channels are padded to multiples of 32, heads each; all else is float32. Padding rows
hold finite numbers and zero gradients. Otherwise as in fp32.py.
"""

from __future__ import annotations

from numba import types

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.crystal.random import combine
from cllm_spheres.kernels import trace as K
from cllm_spheres.kernels.arrays import doubles, f4, floats, integers, matrix, tokens
from cllm_spheres.kernels.bf16.attention import attention_forward as forward_of_attention
from cllm_spheres.kernels.bf16.head import head_loss, head_loss_backward
from cllm_spheres.kernels.bf16.linear import TO_GELU, TO_RESIDUAL, TO_ROWS, gelu_of, project, turn
from cllm_spheres.kernels.bf16.multiply import begin as take_registers
from cllm_spheres.kernels.bf16.multiply import end as give_registers_back
from cllm_spheres.kernels.bf16.norm import layernorm_rows
from cllm_spheres.kernels.bf16.sizes import SWEEP
from cllm_spheres.kernels.bf16.tiles import padded, padded_groups
from cllm_spheres.kernels.trace import mark
from cllm_spheres.model import record as R
from cllm_spheres.model.ops.bf16_backward import attention_backward as attention_backward
from cllm_spheres.model.ops.bf16_backward import linear_backward as linear_backward
from cllm_spheres.model.ops.bf16_packing import pack_unit as pack_unit
from cllm_spheres.model.ops.common import embed_backward as embed_backward
from cllm_spheres.model.ops.common import embed_forward as embed_forward
from cllm_spheres.model.ops.common import norm_backward as norm_backward
from cllm_spheres.model.ops.common import vector
from cllm_spheres.model.record import (
    accumulates,
    keep_scale,
    number,
    op,
    opened,
    operand,
    padded_length,
    site_key,
    size,
)

_project, _turn, _attention_forward = project.external, turn.external, forward_of_attention.external
_head_loss, _head_loss_backward = head_loss.external, head_loss_backward.external


@op
def begin(record, registers):
    """-> targets int32 [N], -1 for padding rows; scratch. Sizes: 1 where rows before FIRST_ROW do not count either."""
    r, g = opened(record, registers)
    take_registers(operand(r, g, 1))
    length, step, first = g[R.LENGTH], padded_length(g), g[R.FIRST_ROW] if size(r, 0) != 0 else 0
    given, out = tokens(g[R.TARGETS], g[R.SEQUENCES] * length), tokens(operand(r, g, 0), g[R.ROWS])
    for n in range(out.size):
        position = n % step
        out[n] = given[n // step * length + position] if first <= position < length else -1
    return 0


@op
def end(record, registers):
    """The tile registers are given back."""
    give_registers_back()
    return 0


@op
def norm_forward(record, registers):
    """x [N, C], gain [C], (bias [C]) -> out in rows, mean [N], rstd [N]; scratch. Sizes: C."""
    r, g = opened(record, registers)
    n, c = g[R.ROWS], size(r, 0)
    layernorm_rows(
        matrix(operand(r, g, 0), n, c), floats(operand(r, g, 1), c), vector(operand(r, g, 2), c), operand(r, g, 3),
        floats(operand(r, g, 4), n), floats(operand(r, g, 5), n), floats(operand(r, g, 6), padded(c)),
    )  # fmt: skip
    return 0


@kernel
def _spread_bias(bias_C, group, out):
    """A bias whose groups (heads) are padded, with zeros between."""
    step = padded(group)
    for h in range(bias_C.size // group):
        for j in range(step):
            out[h * step + j] = bias_C[h * group + j] if j < group else f4(0)


@kernel
def _keys(g, site, keys_B):
    """The dropout keys of each sequence at one place in the model."""
    key = site_key(g, site)
    for b in range(keys_B.size):
        keys_B[b] = types.int64(combine(key, g[R.FIRST_SEQUENCE] + b))


@op
def linear_forward(record, registers):
    """x in rows, w in pairs, (bias [O]), (residual [N, O]) -> (before in rows), out; scratch.

    out = residual + dropout(x @ w + bias), float32; or x @ w + bias in rows; or, where `before` is to have that, its
    GELU in rows. Sizes: I padded, O, O of a head, site.
    """
    r, g = opened(record, registers)
    n, inner, o, group = g[R.ROWS], size(r, 0), size(r, 1), size(r, 2)
    x, w, bias, residual = operand(r, g, 0), operand(r, g, 1), operand(r, g, 2), operand(r, g, 3)
    before, out, scratch = operand(r, g, 4), operand(r, g, 5), operand(r, g, 6)
    room, columns = scratch + 4 * 32 * SWEEP, padded_groups(o, group)
    if residual != 0:
        if g[R.THRESHOLD] != 0:
            _keys(g, size(r, 3), integers(room, g[R.SEQUENCES]))
        _project(
            TO_RESIDUAL, n, o, inner, x, w, bias, residual, out, o, scratch, room, padded_length(g), g[R.THRESHOLD],
            keep_scale(g),
        )  # fmt: skip
        return 0
    if group != o:  # what is written has heads, each with its padding
        if bias != 0 and group % 32 != 0:
            _spread_bias(floats(bias, o), group, floats(room, columns))
            bias = room
        o = columns
    if before != 0:
        _project(TO_GELU, n, o, inner, x, w, bias, before, out, columns, scratch, 0, 0, 0, 0.0)
    else:
        _project(TO_ROWS, n, o, inner, x, w, bias, out, 0, columns, scratch, 0, 0, 0, 0.0)
    return 0


@op
def activate(record, registers):
    """before in rows -> its GELU in rows. Sizes: C padded."""
    r, g = opened(record, registers)
    gelu_of(operand(r, g, 0), g[R.ROWS] * size(r, 0), operand(r, g, 1))
    return 0


@op
def attention_forward(record, registers):
    """qkv in rows -> out in rows, lse [B, H, T]; scratch. Sizes: C of a head, H, site."""
    r, g = opened(record, registers)
    _attention_forward(
        operand(r, g, 0), g[R.SEQUENCES], padded_length(g), size(r, 1), size(r, 0),
        types.int64(site_key(g, size(r, 2))), g[R.FIRST_SEQUENCE], g[R.LENGTH], g[R.THRESHOLD], operand(r, g, 3),
        operand(r, g, 1), operand(r, g, 2), keep_scale(g),
    )  # fmt: skip
    return 0


@op
def head_train(record, registers):
    """x in rows, w flipped, w in pairs, targets [N] -> (dx [N, C]), (dw [V, C]); statistics, scratch, (x in pairs),
    (logits [N, V]), and room for some columns of their gradient, twice.

    The weights stand as [V, C]: logits take them flipped, dx takes them in pairs. Adds to the losses. Sizes: C, V.
    """
    r, g = opened(record, registers)
    n, c, v = g[R.ROWS], size(r, 0), size(r, 1)
    x, w, pairs, targets, dx, dw = (
        operand(r, g, 0), operand(r, g, 1), operand(r, g, 2), operand(r, g, 3), operand(r, g, 4), operand(r, g, 5),
    )  # fmt: skip
    statistics, scratch, x_pairs, logits = operand(r, g, 6), operand(r, g, 7), operand(r, g, 8), operand(r, g, 9)
    if dw != 0:
        _turn(x, n, padded(c), x_pairs, 0)
        mark(g[R.TRACE], K.REARRANGE)
    results = doubles(g.ctypes.data, R.REGISTERS)
    results[R.LOSS] += _head_loss_backward(
        x, x_pairs, c, w, pairs, v, n, targets, g[R.SOFT], statistics, scratch, logits, operand(r, g, 10),
        operand(r, g, 11), dx, dw, 1 if accumulates(r, g, 5) else 0, number(g, R.SCALE),
    )  # fmt: skip
    results[R.EXCESS] += doubles(statistics + 20 * n, 1)[0]
    return 0


@op
def head_evaluate(record, registers):
    """x in rows, w flipped, targets [N]; statistics, scratch -> LOSS and CORRECT. Sizes: C, V."""
    r, g = opened(record, registers)
    skipped = g[R.FIRST_ROW] // 32 * 32  # rows of whole tiles that are not asked for
    c = size(r, 0)
    doubles(g.ctypes.data, R.REGISTERS)[R.LOSS] = _head_loss(
        operand(r, g, 0) + 2 * skipped * padded(c), c, operand(r, g, 1), size(r, 1), g[R.ROWS] - skipped,
        operand(r, g, 2) + 4 * skipped, operand(r, g, 3), operand(r, g, 4), registers + 8 * R.CORRECT,
    )  # fmt: skip
    return 0
