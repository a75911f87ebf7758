"""A model's description -> the program of the passes that write text with it, and where its matrices and its cache lie.

A stream stands as rows of float32, or in bundles (kernels/strips.py), in which products read it. Steps behind the last
block are computed for the rows whose logits are wanted alone.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from cllm_spheres.inference.registers import CACHE, LOGITS, NUM_WANTED, ROWS
from cllm_spheres.kernels.sizes import ALIGN, TILE_COLUMNS
from cllm_spheres.kernels.strips import bundle_floats, strip_bytes
from cllm_spheres.model.description import Attention, Embed, Head, Linear, Norm, Stream
from cllm_spheres.model.families import described
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.packed import Packing
from cllm_spheres.model.program import NOTHING, Builder, Operand, Program
from cllm_spheres.model.shape import Shape

OPS = "cllm_spheres.inference.ops"
PADDING = 1  # tokens of a sequence
MOST_ROWS = 256  # of a pass
LOGITS_FLOATS = 1 << 23  # of a pass, at most: 32 MB
AS_ROWS, AS_BUNDLES = "rows", "bundles"  # the forms of a stream


def most_wanted(shape: Shape) -> int:
    """Rows whose logits a pass can give."""
    return max(1, min(MOST_ROWS, LOGITS_FLOATS // shape.vocab_size))


@dataclass(frozen=True)
class Strips:
    """A matrix of `inputs` and `outputs` in strips, which begin at byte `place` of all strips.

    transposed: the tensor of this name stands as [outputs, inputs].
    """

    name: str
    inputs: int
    outputs: int
    transposed: bool
    place: int


def strips_of(shape: Shape, halves: bool) -> tuple[dict[str, Strips], int]:
    """All matrices that enter products, by name and in the order of their use; the bytes of all."""
    found: dict[str, Strips] = {}
    total = 0
    for step in described(shape).steps:
        if isinstance(step, (Linear, Head)) and step.weight not in found:
            inputs, outputs = step.x.width, step.out.width if isinstance(step, Linear) else shape.vocab_size
            found[step.weight] = Strips(step.weight, inputs, outputs, isinstance(step, Head), total)
            total += strip_bytes(inputs, outputs, halves)
    return found, total


def key_floats(shape: Shape, head_width: int) -> int:
    """Floats of a head's keys: a column for each position, so that a row of a channel is a whole number of vectors."""
    return head_width * (-(-shape.block_size // TILE_COLUMNS) * TILE_COLUMNS)


def head_floats(shape: Shape, head_width: int) -> int:
    """Floats of a head's keys, and behind them of its values."""
    values = -(-shape.block_size * head_width // ALIGN) * ALIGN + TILE_COLUMNS  # a tile reads beyond the last row
    return key_floats(shape, head_width) + values


def cache_places(shape: Shape) -> tuple[dict[Stream, int], int]:
    """Where in a text's slot each attention, known by what it leaves, has its keys and values; the floats of a slot."""
    places: dict[Stream, int] = {}
    total = 0
    for step in described(shape).steps:
        if isinstance(step, Attention):
            places[step.out] = total
            total += step.heads * head_floats(shape, step.out.width // step.heads)
    return places, total


def packing(_: Layout) -> Packing:
    """What is packed depends on the dtype of the weights too: `Writing` knows it."""
    return Packing()


class Writing(Builder):
    """Writes down the calls of a pass that the members of a team compute together."""

    def __init__(self, layout: Layout, halves: bool, members: int) -> None:
        """halves: whether matrices are kept in bfloat16."""
        super().__init__(sys.modules[__name__], layout, 1, 0.0, "none")
        self.rows, self.halves, self.members = MOST_ROWS, halves, members
        self.cache, self.slot_floats = cache_places(self.shape)
        matrices, size_bytes = strips_of(self.shape, halves)
        self.packing = Packing(size_bytes, places={name: (strips.place,) for name, strips in matrices.items()})
        last = max(number for number, step in enumerate(self.steps) if step.block is not None)
        self._behind_blocks = {id(step) for step in self.steps[last + 1 :]}

    @property
    def count(self) -> int:
        """The register with the number of rows that the step computes."""
        return NUM_WANTED if id(self._step) in self._behind_blocks else ROWS

    def room(self, stream: Stream, form: str) -> Operand:
        """A new value for a stream in one of its forms."""
        rows = self.rows if self.count == ROWS else most_wanted(self.shape)
        floats = rows * stream.width if form == AS_ROWS else bundle_floats(rows, stream.width)
        return self.new(stream, 4 * floats, self._part(form))

    def read(self, stream: Stream, form: str) -> Operand:
        """A stream in the form in which the step reads it; an op that brings it into that form where it is not."""
        if (stream, self._part(form)) in self._values:
            return self.of(stream, self._part(form))
        if form == AS_BUNDLES:
            op, source = "bundle", self.read(stream, AS_ROWS)
        else:
            assert self.count == NUM_WANTED, f"{stream} does not stand as rows"
            op, source = "gather", self.of(stream, AS_ROWS)
        out = self.room(stream, form)
        self.emit(op, source, out, sizes=(stream.width, self.count), writes=[out], label="rearrange")
        return out

    def _part(self, form: str) -> str:
        return form if self.count == ROWS else f"{form} that are wanted"


def embed(b: Writing, s: Embed) -> None:
    out = b.room(s.out, AS_ROWS)
    b.emit("embed", b.weight(s.tokens), b.weight(s.positions), out, sizes=[s.out.width], writes=[out])


def norm(b: Writing, s: Norm) -> None:
    x, out = b.read(s.x, AS_ROWS), b.room(s.out, AS_BUNDLES)
    rows, stats = b.room(s.out, AS_ROWS), b.temporary("mean and rstd", 8 * b.rows)
    b.emit(
        "norm", x, b.weight(s.gain), b.weight(s.bias), rows, out, stats, sizes=(s.x.width, b.count), writes=[rows, out]
    )  # fmt: skip


def linear(b: Writing, s: Linear) -> None:
    x, weight, bias = b.read(s.x, AS_BUNDLES), b.packed(s.weight, 0), b.weight(s.bias)
    sizes = s.x.width, s.out.width, b.halves, b.count
    if s.activation:
        before, out = b.temporary(f"{s.out.name} before", 4 * b.rows * s.out.width), b.room(s.out, AS_BUNDLES)
        b.emit(f"linear_{s.activation}", x, weight, bias, before, out, sizes=sizes, writes=[out])
        return
    residual = b.read(s.residual, AS_ROWS) if s.residual else NOTHING
    out = b.room(s.out, AS_ROWS)
    b.emit("linear", x, weight, bias, residual, out, sizes=sizes, writes=[out])


def attention(b: Writing, s: Attention) -> None:
    d = s.out.width // s.heads
    qkv, out = b.read(s.qkv, AS_ROWS), b.room(s.out, AS_BUNDLES)
    cache = Operand(register=CACHE, offset=4 * b.cache[s.out])
    scores = -(-b.shape.block_size // TILE_COLUMNS) * TILE_COLUMNS + -(-d // ALIGN) * ALIGN  # and room for a result
    b.emit(
        "attention", qkv, cache, out, b.temporary("scores", 4 * b.members * scores), writes=[out],
        sizes=(s.heads, d, key_floats(b.shape, d), head_floats(b.shape, d), b.slot_floats, scores),
    )  # fmt: skip


def head(b: Writing, s: Head, _: str) -> None:
    x, logits = b.read(s.x, AS_BUNDLES), Operand(register=LOGITS)
    sizes = s.x.width, b.shape.vocab_size, b.halves, b.count
    b.emit("linear", x, b.packed(s.weight, 0), NOTHING, NOTHING, logits, sizes=sizes)


FORWARD = {Embed: embed, Norm: norm, Linear: linear, Attention: attention}


def program(layout: Layout, halves: bool, members: int) -> Program:
    """The program of a pass by a team of so many members."""
    return Writing(layout, halves, members).build("write")
