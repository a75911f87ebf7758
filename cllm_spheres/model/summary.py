"""A program -> rows that tell what it does: the calls of its ops, those of equal blocks of layers once.

The FLOP of a token are counted as in costs.py, here with what is computed again; the bytes are those that a call adds
to the arena, for each token of the sequences that are computed together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from cllm_spheres.kernels.trace import KINDS
from cllm_spheres.model.costs import step_flops
from cllm_spheres.model.description import Attention, Embed, Head, Linear, Norm, Step
from cllm_spheres.model.plan import lifetimes
from cllm_spheres.model.program import Call, Program, Value
from cllm_spheres.model.shape import Shape


@dataclass(frozen=True)
class Row:
    """One call. new: the values that begin with it."""

    call: Call
    shapes: str
    parameters: int  # that no call before it has used
    flops: int  # for a token
    new: tuple[Value, ...]
    places: dict[Value, int]  # in the arena, of all values
    tokens: int  # of the sequences that are computed together

    @property
    def label(self) -> str:
        """What its time is called in a profile."""
        return KINDS[self.call.mark]

    @property
    def size_bytes(self) -> int:
        """What it adds to the arena."""
        return sum(value.size_bytes for value in self.new)

    @property
    def bytes_per_token(self) -> float:
        """The same for each token of the sequences that are computed together."""
        return self.size_bytes / self.tokens

    @property
    def kind(self) -> tuple[object, ...]:
        """What makes it equal to a call of another block."""
        return self.call.op, self.shapes, self.label, self.parameters, self.flops, self.size_bytes


@dataclass(frozen=True)
class Part:
    """Calls that follow one another in one direction; blocks: the blocks of layers they belong to, in their order.

    The rows are those of the first of the blocks, and equal in all of them.
    """

    forward: bool
    blocks: tuple[int | None, ...]
    rows: tuple[Row, ...]


def shapes_of(step: Step, shape: Shape) -> str:
    """The sizes of what a step works on, for one token."""
    if isinstance(step, Embed):
        return f"({shape.vocab_size:,} + {shape.block_size:,}) x {step.out.width:,}"
    if isinstance(step, Linear):
        return f"{step.x.width:,} x {step.out.width:,}"
    if isinstance(step, Attention):
        return f"{step.heads:,} heads of {step.out.group:,}"
    if isinstance(step, Head):
        return f"{step.x.width:,} x {shape.vocab_size:,}"
    return f"{step.out.width:,}" if isinstance(step, Norm) else ""


def parts(program: Program) -> list[Part]:
    """The program in the order in which it runs."""
    found: list[Part] = []
    for (forward, block), group in groupby(_rows(program), key=lambda row: (row.call.forward, row.call.block)):
        rows = tuple(group)
        last = found[-1] if found else None
        if (
            last is not None and block is not None and last.blocks[0] is not None and last.forward == forward
            and [row.kind for row in rows] == [row.kind for row in last.rows]
        ):  # fmt: skip
            found[-1] = Part(forward, (*last.blocks, block), last.rows)
        else:
            found.append(Part(forward, (block,), rows))
    return found


def _rows(program: Program) -> Iterator[Row]:
    shape, calls = program.layout.shape, program.calls
    lives = lifetimes([call.values for call in calls])
    sizes = {placed.name: placed.size for placed in (*program.layout.tensors, *program.layout.frozen_tensors)}
    trained = {placed.name for placed in program.layout.tensors}
    trains = any(not call.forward for call in calls)
    main: dict[tuple[int, bool], Call] = {}  # of a step and a direction: the call that does its work, not what prepares
    for call in calls:
        at = id(call.step), call.forward
        if call.operands and (at not in main or len(call.operands) > len(main[at].operands)):
            main[at] = call
    for number, call in enumerate(calls):
        step, own = call.step, main.get((id(call.step), True))
        flops = parameters = 0
        if own is not None and call.op == own.op:
            flops = step_flops(step, shape)
            if call is own:
                parameters = sum(sizes.pop(name, 0) for name in step.tensors)
        backward = main.get((id(step), False))
        if call is backward or (trains and call is own and isinstance(step, Head)):
            # A product for the gradient of the input, and one for that of the weight or of attention's other factor.
            both = isinstance(step, Attention) or any(name in trained for name in step.tensors)
            flops += step_flops(step, shape) * (1 + both)
        values = dict.fromkeys(value for value in call.values if value.name != "scratch")
        new = tuple(value for value in values if lives[value][0] == number)
        tokens = program.sequences * shape.block_size
        yield Row(call, shapes_of(step, shape), parameters, flops, new, program.places, tokens)
