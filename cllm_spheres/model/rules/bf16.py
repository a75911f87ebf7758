"""What each step becomes in bfloat16, forward and backward.

The operands of all matrix products are rounded to bfloat16, and so are the activations that are kept only as such
operands, in the rows form of kernels/bf16/tiles.py; the residual stream and its gradient, norms, softmax, loss and the
gradients of parameters are float32. Sequences are padded to 32 tokens, heads and channels to 32 columns. Weights are
packed: two forms of every matrix, in units that are each a pure function of the parameters.
"""

from __future__ import annotations

import numpy as np

from cllm_spheres.kernels.bf16.sizes import (
    CHUNK,
    GROUPS_A_UNIT,
    SWEEP,
    attention_bytes,
    kept_logits,
    padded,
    padded_groups,
)
from cllm_spheres.model.description import Attention, Embed, Head, Linear, Norm, Step, Stream
from cllm_spheres.model.families import described
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.packed import Packing
from cllm_spheres.model.program import NOTHING, Builder, Operand
from cllm_spheres.model.rules.fp32 import embed, embed_backward, norm_backward
from cllm_spheres.model.shape import Shape

OPS = "cllm_spheres.model.ops.bf16"
PADDING = 32  # tokens of a sequence
ROWS_AT_A_TIME = 1024
PAIRS, FLIPPED = 0, 1  # the packed forms of a matrix: for products with it, and with its transpose
TARGETS = Stream("targets", 1, 1)


def sequences_at_a_time(shape: Shape) -> int:
    """How many sequences of a shard are computed together: a function of the shape alone."""
    return max(1, ROWS_AT_A_TIME // padded(shape.block_size))


def packing(layout: Layout) -> Packing:
    """Both forms of each matrix, one after the other: first of the matrices that are trained."""
    matrices: dict[str, tuple[int, int, int, int]] = {}  # rows, columns, and the groups they come in
    for step in described(layout.shape).steps:
        if isinstance(step, Linear):
            matrices[step.weight] = step.x.width, step.out.width, step.x.group, step.out.group
        elif isinstance(step, Head):
            matrices[step.weight] = layout.shape.vocab_size, step.x.width, layout.shape.vocab_size, step.x.group
    table, places = [len(matrices)], dict[str, tuple[int, ...]]()
    end, units = 0, [0, 0]
    for frozen, tensors in enumerate((layout.tensors, layout.frozen_tensors)):
        for tensor in tensors:
            if tensor.name not in matrices:
                continue
            rows, columns, row_group, column_group = matrices[tensor.name]
            down, across = padded_groups(rows, row_group), padded_groups(columns, column_group)
            size = 2 * down * across
            places[tensor.name] = end, end + size
            table += [
                frozen, tensor.offset, rows, columns, row_group, column_group, end, end + size, sum(units)
            ]  # fmt: skip
            end += 2 * size
            units[frozen] += down // 32 * -(-across // (32 * GROUPS_A_UNIT))
    return Packing(end, units[0], units[1], np.array(table, np.int64), places, OPS)


def _is_residual(step: Step) -> bool:
    """Whether a step leaves the residual stream, float32; all others leave rows form."""
    return isinstance(step, Embed) or (isinstance(step, Linear) and step.residual is not None)


def _is_float32(step: Step) -> bool:
    """Whether the gradient of what a step leaves is float32."""
    return isinstance(step, Norm) or _is_residual(step)


def _residual(b: Builder, stream: Stream) -> Operand:
    """The residual stream."""
    assert _is_residual(b.producer[stream]), f"{stream.name} is not of the residual stream"
    return b.of(stream)


def _rows(b: Builder, stream: Stream) -> Operand:
    """What stands in rows form."""
    assert not _is_residual(b.producer[stream]), f"{stream.name} is of the residual stream, which a norm alone reads"
    return b.of(stream)


def _across(stream: Stream) -> int:
    """Columns of a stream in rows form."""
    return padded_groups(stream.width, stream.group)


def _form(b: Builder, stream: Stream) -> int:
    """Bytes of a stream in rows form, or in any other."""
    return 2 * b.rows * _across(stream)


def _floats(b: Builder, stream: Stream) -> int:
    return 4 * b.rows * stream.width


def _is_spread(stream: Stream) -> bool:
    """Whether there are unused columns between the groups of a stream in rows form."""
    return stream.group != stream.width and stream.group % 32 != 0


def _products(b: Builder, s: Linear) -> Operand:
    """Scratch for products and what ends them: a block, and behind it sums, a spread bias or keys of sequences."""
    return b.scratch(4 * 32 * SWEEP + max(4 * _across(s.x), 8 * _across(s.out), 8 * b.sequences))


def begin(b: Builder, purpose: str) -> None:
    """Targets with padding, and what the CPU prepares its products with."""
    assert purpose in ("train", "evaluate"), f"{purpose} are computed in float32"
    targets = b.new(TARGETS, 4 * b.rows)
    b.emit("begin", targets, b.scratch(64), sizes=[purpose == "evaluate"])


def end(b: Builder) -> None:
    b.emit("end")


def norm(b: Builder, s: Norm) -> None:
    out, mean, rstd = b.new(s.out, _form(b, s.out)), b.new(s.out, 4 * b.rows, "mean"), b.new(s.out, 4 * b.rows, "rstd")
    b.emit(
        "norm_forward", _residual(b, s.x), b.weight(s.gain), b.weight(s.bias), out, mean, rstd,
        b.scratch(4 * _across(s.x)), sizes=[s.x.width], writes=[out, mean, rstd],
    )  # fmt: skip


def linear(b: Builder, s: Linear) -> None:
    before = b.new(s.out, _form(b, s.out), "before") if s.activation else NOTHING
    out = b.new(s.out, _floats(b, s.out) if _is_float32(s) else _form(b, s.out))
    b.emit(
        "linear_forward", _rows(b, s.x), b.packed(s.weight, PAIRS), b.weight(s.bias),
        _residual(b, s.residual) if s.residual else NOTHING, before, out, _products(b, s),
        sizes=(_across(s.x), s.out.width, s.out.group, s.site), writes=[before, out],
    )  # fmt: skip


def activate(b: Builder, s: Linear) -> None:
    """The activation alone, again."""
    before, out = b.of(s.out, "before"), b.new(s.out, _form(b, s.out))
    b.emit("activate", before, out, sizes=[_across(s.out)], writes=[out], label="gelu")


def linear_backward(b: Builder, s: Linear) -> None:
    producer, wanted = b.producer[s.x], b.trains(s.weight)
    activated = isinstance(producer, Linear) and producer.activation != "" and b.needs_gradient(s.x)
    before = db_before = NOTHING
    if isinstance(producer, Linear) and activated:
        # The product ends with the activation's slope, and in the activation's own place where that is kept.
        dx = b.take_over(s.x, b.of(s.x)) if wanted else b.new_gradient(s.x, _form(b, s.x))
        before, db_before = b.of(s.x, "before"), b.segment(producer.bias)
    else:
        dx = b.new_gradient(s.x, _floats(b, s.x) if _is_float32(producer) else _form(b, s.x))
    enters = _is_float32(s)
    b.emit(
        "linear_backward", b.gradient(s.out), b.of(s.x) if wanted else NOTHING, b.packed(s.weight, FLIPPED), before, dx,
        b.segment(s.weight),
        NOTHING if s.activation else b.segment(s.bias), db_before, _products(b, s),
        b.temporary("gradient in rows", _form(b, s.out)) if enters else NOTHING,
        b.temporary("gradient in pairs", _form(b, s.out)) if wanted else NOTHING,
        b.temporary("input in columns", _form(b, s.x)) if wanted else NOTHING,
        b.temporary("dropped", _floats(b, s.out)) if enters and b.rate > 0 else NOTHING,
        b.temporary("spread gradient", 4 * _across(s.x) * _across(s.out))
        if wanted and (_is_spread(s.x) or _is_spread(s.out)) else NOTHING,
        sizes=(s.x.width, s.x.group, s.out.width, s.out.group, s.site, _is_float32(producer)),
        label="gelu backward" if activated else "linear dx",
    )  # fmt: skip
    if s.residual is not None:
        b.hand_on(s.out, s.residual)


def attention(b: Builder, s: Attention) -> None:
    out, lse = b.new(s.out, _form(b, s.out)), b.new(s.out, 4 * b.rows * s.heads, "lse")
    b.emit(
        "attention_forward", _rows(b, s.qkv), out, lse, _attention_scratch(b, s), sizes=(s.out.group, s.heads, s.site),
        writes=[out, lse],
    )  # fmt: skip


def attention_backward(b: Builder, s: Attention) -> None:
    b.emit(
        "attention_backward", b.gradient(s.out), b.of(s.qkv), b.of(s.out), b.of(s.out, "lse"),
        b.new_gradient(s.qkv, _form(b, s.qkv)), _attention_scratch(b, s), sizes=(s.out.group, s.heads, s.site),
        label="attention backward",
    )  # fmt: skip


def _attention_scratch(b: Builder, s: Attention) -> Operand:
    return b.scratch(attention_bytes(b.padded_length, padded(s.out.group)))


def head(b: Builder, s: Head, purpose: str) -> None:
    c, v, n = s.x.width, b.shape.vocab_size, b.rows
    x, targets, scratch = _rows(b, s.x), b.of(TARGETS), b.scratch(4 * 32 * CHUNK)
    if purpose == "evaluate":
        b.emit(
            "head_evaluate", x, b.packed(s.weight, FLIPPED), targets, b.temporary("statistics", 16 * n), scratch,
            sizes=(c, v),
        )  # fmt: skip
        return
    chunk, kept = min(CHUNK, padded(v)), kept_logits(n, v)
    b.emit(
        "head_train", x, b.packed(s.weight, FLIPPED), b.packed(s.weight, PAIRS), targets,
        b.new_gradient(s.x, _floats(b, s.x)), b.segment(s.weight), b.temporary("statistics", 4 * (5 * n + 2)), scratch,
        b.temporary("input in pairs", _form(b, s.x)) if b.trains(s.weight) else NOTHING,
        b.temporary("logits", 4 * kept) if kept else NOTHING, b.temporary("gradient of logits", 2 * n * chunk),
        b.temporary("gradient of logits in columns", 2 * n * chunk), sizes=(c, v),
    )  # fmt: skip


FORWARD = {Embed: embed, Norm: norm, Linear: linear, Attention: attention}
BACKWARD = {Embed: embed_backward, Norm: norm_backward, Linear: linear_backward, Attention: attention_backward}
