"""What each step becomes in float32, forward and backward. Everything in the arena is float32.

N rows of all sequences together, C channels.
"""

from __future__ import annotations

from dataclasses import replace

from cllm_spheres.kernels.sizes import attention_floats, product_floats
from cllm_spheres.kernels.trace import KINDS
from cllm_spheres.model.description import Attention, Embed, Head, Linear, Norm, Stream
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.packed import Packing
from cllm_spheres.model.program import NOTHING, Builder, Operand
from cllm_spheres.model.shape import Shape

OPS = "cllm_spheres.model.ops.fp32"
PADDING = 1  # tokens of a sequence

# Tokens computed together: below this width 256 are as fast as more and keep the arena in cache; from it on packing the
# weights for more rows at once pays (width 384: 5 %).
WIDE = 384
ROWS_AT_A_TIME, ROWS_WHERE_WIDE = 256, 512
LOGITS_FLOATS = 1 << 24  # of one chunk of the head, at most: 64 MB


def sequences_at_a_time(shape: Shape) -> int:
    """How many sequences of a shard are computed together: a function of the shape alone."""
    return max(1, (ROWS_AT_A_TIME if shape.width < WIDE else ROWS_WHERE_WIDE) // shape.block_size)


def head_rows(rows: int, vocab_size: int) -> int:
    """Rows whose logits exist at once: chunks of nearly equal size, as few as `LOGITS_FLOATS` allows."""
    most = max(16, LOGITS_FLOATS // vocab_size)
    return -(-rows // -(-rows // most))


def packing(_: Layout) -> Packing:
    """Nothing is packed."""
    return Packing()


def _bytes(b: Builder, stream: Stream) -> int:
    return 4 * b.rows * stream.width


def _products(b: Builder, *sizes: int) -> Operand:
    """Scratch for products of the rows and of matrices of these sizes."""
    return b.scratch(4 * product_floats(max(b.rows, *sizes)))


def embed(b: Builder, s: Embed) -> None:
    out = b.new(s.out, _bytes(b, s.out))
    sizes = s.out.width, b.shape.vocab_size, b.shape.block_size, s.site
    b.emit("embed_forward", b.weight(s.tokens), b.weight(s.positions), out, sizes=sizes, writes=[out])


def embed_backward(b: Builder, s: Embed) -> None:
    sizes = s.out.width, b.shape.vocab_size, b.shape.block_size, s.site
    b.emit(
        "embed_backward", b.gradient(s.out), b.segment(s.tokens), b.segment(s.positions), sizes=sizes,
        label="embedding backward",
    )  # fmt: skip


def norm(b: Builder, s: Norm) -> None:
    out, mean, rstd = b.new(s.out, _bytes(b, s.out)), b.new(s.out, 4 * b.rows, "mean"), b.new(s.out, 4 * b.rows, "rstd")
    b.emit(
        "norm_forward", b.of(s.x), b.weight(s.gain), b.weight(s.bias), out, mean, rstd, sizes=[s.x.width],
        writes=[out, mean, rstd],
    )  # fmt: skip


def norm_backward(b: Builder, s: Norm) -> None:
    dx = b.add_gradient(s.x, _bytes(b, s.x))
    b.emit(
        "norm_backward", b.gradient(s.out), b.of(s.x), b.weight(s.gain), b.of(s.out, "mean"), b.of(s.out, "rstd"),
        dx if dx != NOTHING else b.temporary("dx that nobody reads", _bytes(b, s.x)),
        _or_room(b, b.segment(s.gain), s.x.width), b.segment(s.bias), sizes=[s.x.width], label="layer norm backward",
    )  # fmt: skip


def _or_room(b: Builder, gradient: Operand, floats: int) -> Operand:
    """Where a gradient goes; where it is not wanted, room for it."""
    if gradient != NOTHING:
        return gradient
    return replace(b.temporary("a gradient that nobody reads", 4 * floats), first=True)


def linear(b: Builder, s: Linear) -> None:
    before = b.new(s.out, _bytes(b, s.out), "before") if s.activation else NOTHING
    out = b.new(s.out, _bytes(b, s.out))
    b.emit(
        "linear_forward", b.of(s.x), b.weight(s.weight), b.weight(s.bias), b.of(s.residual) if s.residual else NOTHING,
        before, out, _products(b, s.x.width, s.out.width),
        sizes=(s.x.width, s.out.width, s.site, KINDS.index(s.label)), writes=[before, out],
        label="gelu" if s.activation else "",
    )  # fmt: skip


def activate(b: Builder, s: Linear) -> None:
    """The activation alone, again."""
    before, out = b.of(s.out, "before"), b.new(s.out, _bytes(b, s.out))
    b.emit("activate", before, out, sizes=[s.out.width], writes=[out], label="gelu")


def linear_backward(b: Builder, s: Linear) -> None:
    dout, producer = b.gradient(s.out), b.producer[s.x]
    activated = isinstance(producer, Linear) and producer.activation != "" and b.needs_gradient(s.x)
    drops = s.residual is not None and b.rate > 0
    b.emit(
        "linear_backward", dout, b.of(s.x) if b.trains(s.weight) else NOTHING, b.weight(s.weight),
        b.of(s.x, "before") if activated else NOTHING,
        b.new_gradient(s.x, _bytes(b, s.x)), b.segment(s.weight), b.segment(s.bias),
        _products(b, s.x.width, s.out.width), b.temporary("dropped", _bytes(b, s.out)) if drops else NOTHING,
        sizes=(s.x.width, s.out.width, s.site if s.residual else -1, KINDS.index("linear backward")),
        label="gelu backward" if activated else "linear backward",
    )  # fmt: skip
    if s.residual is not None:
        b.hand_on(s.out, s.residual)


def attention(b: Builder, s: Attention) -> None:
    out = b.new(s.out, _bytes(b, s.out))
    lse = b.new(s.out, 4 * b.rows * s.heads, "lse")
    b.emit(
        "attention_forward", b.of(s.qkv), out, lse, b.scratch(4 * attention_floats(b.shape.block_size)),
        sizes=(s.out.width, s.heads, s.site), writes=[out, lse],
    )  # fmt: skip


def attention_backward(b: Builder, s: Attention) -> None:
    b.emit(
        "attention_backward", b.gradient(s.out), b.of(s.qkv), b.of(s.out), b.of(s.out, "lse"),
        b.new_gradient(s.qkv, _bytes(b, s.qkv)), b.scratch(4 * attention_floats(b.shape.block_size)),
        sizes=(s.out.width, s.heads, s.site), label="attention backward",
    )  # fmt: skip


def head(b: Builder, s: Head, purpose: str) -> None:
    c, v = s.x.width, b.shape.vocab_size
    x, w, products = b.of(s.x), b.weight(s.weight), _products(b, c, v)
    if purpose == "logits":
        b.emit("head_logits", x, w, products, sizes=(c, v))
        return
    rows = head_rows(b.rows, v)
    logits = b.temporary("logits", 4 * rows * v)
    if purpose == "evaluate":
        b.emit("head_evaluate", x, w, logits, products, sizes=(c, v, rows))
        return
    dx = b.new_gradient(s.x, _bytes(b, s.x))
    b.emit("head_train", x, w, dx, b.segment(s.weight), logits, products, sizes=(c, v, rows))


FORWARD = {Embed: embed, Norm: norm, Linear: linear, Attention: attention}
BACKWARD = {Embed: embed_backward, Norm: norm_backward, Linear: linear_backward, Attention: attention_backward}
