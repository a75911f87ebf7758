"""A model's description, and what it is to do -> a program: calls of compiled ops, and places for all they work on.

The forward pass is the family's; the backward pass follows by one rule an op. The rules of a dtype (rules/) say which
ops a step becomes, in both directions, and how large their activations are. Nothing is compiled here: ops are named,
and looked up when a process asks for the records.

In the backward pass, `recompute` says what is computed again instead of being kept: "none" nothing, "cheap" norms and
activations, "block" all but what enters a block of layers. It changes no bits, since the same ops do the same again.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from types import ModuleType

import numpy as np

from cllm_spheres.kernels.progress import BACKWARD, FORWARD
from cllm_spheres.kernels.trace import KINDS
from cllm_spheres.model import dtypes
from cllm_spheres.model import record as R
from cllm_spheres.model.description import Head, Linear, Norm, Step, Stream
from cllm_spheres.model.families import described
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.packed import Packing
from cllm_spheres.model.plan import lifetimes, place

RECOMPUTE = ("none", "cheap", "block")


@dataclass(frozen=True, eq=False)
class Value:
    """Something in the arena: an activation, a gradient, scratch. Two of one name are two values."""

    name: str
    size_bytes: int


@dataclass(frozen=True)
class Operand:
    """What a call works on: a value, or so many bytes behind an address that a register holds."""

    value: Value | None = None
    register: int = R.NONE
    offset: int = 0
    first: bool = False  # this call is the first to write it


NOTHING = Operand()


@dataclass
class Call:
    """One call of an op, for a step. advance: that a block of layers ends here, forward or backward."""

    op: str
    operands: tuple[Operand, ...]
    sizes: tuple[int, ...]
    mark: int
    step: Step
    writes: tuple[Value, ...]
    advance: int = 0
    forward: bool = True

    @property
    def block(self) -> int | None:
        return self.step.block

    @property
    def values(self) -> list[Value]:
        return [operand.value for operand in self.operands if operand.value is not None]


@dataclass(frozen=True)
class Program:
    """What a model does for some sequences: calls, and where their values lie in an arena of `arena_bytes`."""

    rules: ModuleType
    layout: Layout
    calls: tuple[Call, ...]
    places: dict[Value, int]
    arena_bytes: int
    sequences: int  # computed together, at most
    rate: int  # of dropout, times 2**32
    streams: dict[Stream, Value] = field(repr=False)  # what each stream became

    @property
    def arena_floats(self) -> int:
        return self.arena_bytes // 4

    @property
    def backward_layers(self) -> int:
        """How often the backward pass advances the count of layers: fewer where the lower ones are frozen."""
        return sum(call.advance == BACKWARD for call in self.calls)

    def records(self) -> np.ndarray:
        """int64 [calls, RECORD_WORDS], as the runner takes them. The ops are compiled at their first use."""
        ops = importlib.import_module(self.rules.OPS)
        records = np.zeros((len(self.calls), R.RECORD_WORDS), np.int64)
        for record, call in zip(records, self.calls, strict=True):
            record[R.ADDRESS] = getattr(ops, call.op).address
            record[R.MARK], record[R.ADVANCE] = call.mark, call.advance
            for i, operand in enumerate(call.operands):
                record[R.FIRST] |= operand.first << i
                at = R.OPERANDS + 2 * i
                if operand.value is not None:
                    record[at : at + 2] = R.ARENA, self.places[operand.value]
                else:
                    record[at : at + 2] = operand.register, operand.offset
            record[R.SIZES : R.SIZES + len(call.sizes)] = call.sizes
        return records


class Builder:
    """Writes a program's calls down. The rules of a dtype work on it; `rows` are those of all sequences together."""

    def __init__(self, rules: ModuleType, layout: Layout, sequences: int, dropout: float, recompute: str) -> None:
        self.rules, self.layout, self.shape = rules, layout, layout.shape
        self.packing: Packing = rules.packing(layout)
        self.sequences, self.rate, self.recompute = sequences, round(dropout * 2**32), recompute
        self.padded_length = -(-self.shape.block_size // rules.PADDING) * rules.PADDING
        self.rows = sequences * self.padded_length
        self.steps = described(self.shape).steps
        self.producer: dict[Stream, Step] = {s.out: s for s in self.steps if hasattr(s, "out")}
        self.calls: list[Call] = []
        self._trained = {t.name: t for t in layout.tensors}
        self._frozen = {t.name: t for t in layout.frozen_tensors}
        self._values: dict[tuple[Stream, str], Value] = {}
        self._gradients: dict[Stream, Value] = {}
        self._written: set[str] = set()
        self._again: set[int] = set()
        self._step: Step = self.steps[0]
        self._scratch = 0
        self._forward = True
        self._needing: set[Stream] = set()
        for step in self.steps:
            if any(name in self._trained for name in step.tensors) or any(s in self._needing for s in step.inputs):
                self._needing |= {step.out} if hasattr(step, "out") else set()

    # --- what rules ask for ---

    def new(self, stream: Stream, size_bytes: int, part: str = "") -> Operand:
        """A new value for a stream, or for another part of what its step leaves (`part`), such as a norm's mean."""
        value = self._values[stream, part] = Value(f"{stream.name} {part}".strip(), size_bytes)
        return Operand(value)

    def of(self, stream: Stream, part: str = "") -> Operand:
        """The newest value of a stream."""
        return Operand(self._values[stream, part])

    def temporary(self, name: str, size_bytes: int) -> Operand:
        """Room for one call."""
        return Operand(Value(name, size_bytes))

    def scratch(self, size_bytes: int) -> Operand:
        """Room that all calls share: what stands in it is lost between them."""
        self._scratch = max(self._scratch, size_bytes)
        return Operand(register=R.ARENA)

    def weight(self, name: str) -> Operand:
        """A parameter, trained or frozen; NOTHING where the model has none of this name."""
        for register, places in ((R.PARAMS, self._trained), (R.FROZEN, self._frozen)):
            if name in places:
                return Operand(register=register, offset=4 * places[name].offset)
        return NOTHING

    def packed(self, name: str, form: int) -> Operand:
        """A matrix, trained or frozen, in one of the forms in which the dtype packs it."""
        return Operand(register=R.PACKED, offset=self.packing.places[name][form])

    def segment(self, name: str) -> Operand:
        """Where the gradient of a parameter goes; NOTHING where it is not trained."""
        if name not in self._trained:
            return NOTHING
        first = name not in self._written
        self._written.add(name)
        return Operand(register=R.SEGMENT, offset=4 * self._trained[name].offset, first=first)

    def trains(self, *names: str) -> bool:
        return any(name in self._trained for name in names)

    def needs_gradient(self, stream: Stream) -> bool:
        """Whether something that is trained lies before a stream."""
        return stream in self._needing

    def gradient(self, stream: Stream) -> Operand:
        """The gradient of a stream, which later calls have left."""
        return Operand(self._gradients[stream])

    def new_gradient(self, stream: Stream, size_bytes: int) -> Operand:
        """Room for the gradient of a stream that one step alone reads; NOTHING where nothing needs it."""
        if not self.needs_gradient(stream):
            return NOTHING
        assert stream not in self._gradients, f"a second gradient of {stream}"
        self._gradients[stream] = Value(f"gradient of {stream.name}", size_bytes)
        return Operand(self._gradients[stream])

    def add_gradient(self, stream: Stream, size_bytes: int) -> Operand:
        """The gradient of a stream that several steps read, to be added to; `first` where it is to be begun."""
        if not self.needs_gradient(stream):
            return NOTHING
        if stream in self._gradients:
            return Operand(self._gradients[stream])
        self._gradients[stream] = Value(f"gradient of {stream.name}", size_bytes)
        return Operand(self._gradients[stream], first=True)

    def take_over(self, stream: Stream, operand: Operand) -> Operand:
        """Let the gradient of a stream stand in a value that is no longer needed."""
        assert operand.value is not None and stream not in self._gradients
        self._gradients[stream] = operand.value
        return operand

    def hand_on(self, out: Stream, residual: Stream) -> None:
        """The gradient of a sum goes on, unchanged, to what was added: in the same place, where others add to it."""
        if self.needs_gradient(residual):
            assert residual not in self._gradients, f"{residual} is added in two places"
            self._gradients[residual] = self._gradients[out]

    def emit(
        self, op: str, *operands: Operand, sizes: Iterable[int] = (), writes: Iterable[Operand] = (), label: str = ""
    ) -> None:
        """One call more. writes: the values it leaves; without any it is never left out. label: of its time."""
        values = tuple(operand.value for operand in writes if operand.value is not None)
        mark = KINDS.index(label or self._step.label)
        operands, sizes = tuple(operands), tuple(int(size) for size in sizes)
        assert len(operands) <= R.MOST_OPERANDS and len(sizes) <= R.MOST_SIZES
        self.calls.append(Call(op, operands, sizes, mark, self._step, values, forward=self._forward))

    # --- the passes ---

    def build(self, purpose: str) -> Program:
        """purpose: "train", "evaluate" (losses alone), "logits", or "states" (no logits, but `state_streams`)."""
        rules = self.rules
        if hasattr(rules, "begin"):
            rules.begin(self, purpose)
        for step in self.steps:
            self._step = step
            if isinstance(step, Head):
                if purpose != "states":
                    rules.head(self, step, purpose)
            else:
                rules.FORWARD[type(step)](self, step)
        self._mark_blocks(FORWARD, 0)
        if purpose == "train":
            self._backward()
        if hasattr(rules, "end"):
            self._step = self.steps[-1]
            rules.end(self)
        states = state_streams(self.steps) if purpose == "states" else []
        return self._program([self._values[stream, ""] for stream in states])

    def _backward(self) -> None:
        self._forward, start = False, len(self.calls)
        readers = {stream: step for step in self.steps for stream in step.inputs}
        for step in reversed(self.steps[:-1]):
            if isinstance(step, Linear) and step.activation:  # whose slope comes with the gradient of what reads it
                reader = readers[step.out]
                assert isinstance(reader, Linear) and reader.x == step.out, f"{step.out.name} enters no linear layer"
            if not (self.trains(*step.tensors) or any(self.needs_gradient(s) for s in step.inputs)):
                continue
            self._compute_again(step)
            self._step = step
            self.rules.BACKWARD[type(step)](self, step)
        self._mark_blocks(BACKWARD, start)

    def _compute_again(self, step: Step) -> None:
        """What a step's backward reads and was not kept."""
        if self.recompute == "block" and step.block is not None and step.block not in self._again:
            self._again.add(step.block)
            for other in self.steps:
                if other.block == step.block:
                    self._step = other
                    self.rules.FORWARD[type(other)](self, other)
        elif self.recompute == "cheap":
            for stream in step.inputs:
                producer = self.producer[stream]
                if id(producer) in self._again or producer.block is None:
                    continue
                self._step = producer
                if isinstance(producer, Norm):
                    self._again.add(id(producer))
                    self.rules.FORWARD[Norm](self, producer)
                elif isinstance(producer, Linear) and producer.activation:
                    self._again.add(id(producer))
                    self.rules.activate(self, producer)

    def _mark_blocks(self, advance: int, start: int) -> None:
        """The last call of each block advances the count of layers; the last of all where no block has any."""
        calls = self.calls[start:]
        for call, after in zip(calls, [*calls[1:], None], strict=True):
            if call.block is not None and (after is None or after.block != call.block):
                call.advance = advance
        if not any(call.advance for call in calls):
            self.calls[-1].advance = advance

    def _program(self, kept: list[Value]) -> Program:
        """kept: values that are to stand in the arena at the end."""
        calls = _without_unused(self.calls, kept)
        scratch = Value("scratch", self._scratch)
        for call in calls:
            call.operands = tuple(
                Operand(scratch) if o.value is None and o.register == R.ARENA else o for o in call.operands
            )
        used: list[list[Value]] = [call.values for call in calls]
        used[0], used[-1] = [*used[0], scratch], [*used[-1], scratch, *kept]
        lives = lifetimes(used)
        places, size = place(lives, {value: value.size_bytes for value in lives})
        streams = {stream: value for (stream, part), value in self._values.items() if not part}
        return Program(self.rules, self.layout, tuple(calls), places, size, self.sequences, self.rate, streams)


def state_streams(steps: list[Step]) -> list[Stream]:
    """What enters the first block, what each but the last one leaves, and what enters the head."""
    ends = [a.out for a, b in pairwise(steps) if b.block not in (None, a.block) and hasattr(a, "out")]
    return ends + [step.x for step in steps if isinstance(step, Head)]


def _without_unused(calls: list[Call], wanted: list[Value]) -> list[Call]:
    """Without the calls that leave only what nobody reads afterwards, such as the last product of a repeated block."""
    kept: list[Call] = []
    read = set(wanted)
    for call in reversed(calls):
        if call.writes and not call.advance and not any(value in read for value in call.writes):
            continue
        kept.append(call)
        read.update(call.values)
    return kept[::-1]


def program(
    layout: Layout, dtype: str, *, largest_shard: int, dropout: float = 0.0, recompute: str = "none",
    purpose: str = "train",
) -> Program:  # fmt: skip
    """The program of a model. largest_shard: sequences; a training computes no more together, others one at a time."""
    rules = dtypes.rules(dtype)
    sequences = min(rules.sequences_at_a_time(layout.shape), largest_shard) if purpose == "train" else 1
    return Builder(rules, layout, sequences, dropout, recompute).build(purpose)
