"""Sixteen float32 at a time, written down as such: for loops that the compiler's own vectoriser does not do well.

Inside the code generation of an intrinsic a `Lanes` holds an LLVM vector and knows +, -, * and a few functions. LLVM
splits the vectors where a CPU has narrower ones. Nothing is reassociated: what is written is what is computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cllm_spheres.crystal.cpu import has

WIDTH = 16
FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
WORDS = ir.VectorType(ir.IntType(32), WIDTH)
_MASK = ir.VectorType(ir.IntType(1), WIDTH)
_i32, _i64 = ir.IntType(32), ir.IntType(64)


_HAS_ESTIMATE = has("avx512f")


class Lanes:
    """Sixteen float32; or one, so that a function of lanes can be one of a number too."""

    def __init__(self, b: Any, value: Any) -> None:
        self.b, self.value = b, value

    def _other(self, other: Any) -> Any:
        return other.value if isinstance(other, Lanes) else ir.Constant(self.value.type, float(other))

    def __add__(self, other: Any) -> Lanes:
        return Lanes(self.b, self.b.fadd(self.value, self._other(other)))

    def __sub__(self, other: Any) -> Lanes:
        return Lanes(self.b, self.b.fsub(self.value, self._other(other)))

    def __mul__(self, other: Any) -> Lanes:
        return Lanes(self.b, self.b.fmul(self.value, self._other(other)))

    __radd__, __rmul__ = __add__, __mul__

    def times_plus(self, factor: Any, addend: Any) -> Lanes:
        """self * factor + addend, rounded once."""
        kind = self.value.type
        fma = function(self.b, "llvm.fma.v16f32" if kind == FLOATS else "llvm.fma.f32", kind, [kind] * 3)
        return Lanes(self.b, self.b.call(fma, [self.value, self._other(factor), self._other(addend)]))

    def where(self, condition: Any, otherwise: Any) -> Lanes:
        """These lanes where the condition holds, the others' elsewhere."""
        return Lanes(self.b, self.b.select(condition, self.value, self._other(otherwise)))

    def less(self, other: Any) -> Any:
        """self < other, false for NaN."""
        return self.b.fcmp_ordered("<", self.value, self._other(other))

    def larger(self, other: Any) -> Lanes:
        """The larger of two; the other where this is NaN."""
        other = self.filled(other)
        return self.where(other.less(self), other)

    def filled(self, number: Any) -> Lanes:
        """The number in every lane; lanes stay what they are."""
        return Lanes(self.b, self._other(number))

    def scaled(self, rounded: Lanes) -> Lanes:
        """self * 2.0**n for `rounded` = n + 1.5 * 2**23; these numbers and the result have to be normal.

        Adding that constant rounds to a whole number n, which then stands in the lowest bits.
        """
        kind, words = self.value.type, WORDS if self.value.type == FLOATS else _i32
        n = self.b.shl(self.b.bitcast(rounded.value, words), ir.Constant(words, 23))
        return Lanes(self.b, self.b.bitcast(self.b.add(self.b.bitcast(self.value, words), n), kind))


def function(b: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """A function of the module that is being built, declared where it was not."""
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(result, arguments), name)


def constant(value: int) -> Any:
    """An int64."""
    return ir.Constant(_i64, value)


def place(b: Any, address: Any, offset: Any, kind: Any) -> Any:
    """A pointer to `kind` at address + offset bytes."""
    return b.inttoptr(b.add(address, offset if isinstance(offset, ir.Value) else constant(offset)), kind.as_pointer())


def load(b: Any, address: Any, offset: Any = 0, mask: Any = None) -> Lanes:
    """Sixteen float32 at address + offset bytes; with a mask zeros elsewhere, where nothing is read."""
    pointer = place(b, address, offset, FLOATS)
    if mask is None:
        return Lanes(b, b.load(pointer, align=4))
    masked = function(b, "llvm.masked.load.v16f32.p0", FLOATS, [pointer.type, _i32, _MASK, FLOATS])
    return Lanes(b, b.call(masked, [pointer, ir.Constant(_i32, 4), mask, ir.Constant(FLOATS, [0.0] * WIDTH)]))


def store(lanes: Lanes, address: Any, offset: Any = 0, mask: Any = None) -> None:
    """Write sixteen float32 at address + offset bytes; with a mask only those."""
    b, pointer = lanes.b, place(lanes.b, address, offset, FLOATS)
    if mask is None:
        b.store(lanes.value, pointer, align=4)
        return
    masked = function(b, "llvm.masked.store.v16f32.p0", ir.VoidType(), [FLOATS, pointer.type, _i32, _MASK])
    b.call(masked, [lanes.value, pointer, ir.Constant(_i32, 4), mask])


def over(b: Any, count: Any, body: Callable[[Any, Any], None]) -> None:
    """body(offset in bytes, mask) for every sixteen of `count` numbers; the mask of whole sixteens is None.

    A mask is never empty: a masked access to an address that is not mapped is slow even where nothing is wanted.
    """
    whole = b.and_(count, constant(-WIDTH))
    with cgutils.for_range_slice(b, constant(0), whole, constant(WIDTH), intp=_i64) as (i, _):
        body(b.mul(i, constant(4)), None)
    rest = b.sub(count, whole)
    with b.if_then(b.icmp_signed(">", rest, constant(0))):
        body(b.mul(whole, constant(4)), first_lanes(b, rest))


def spread(b: Any, number: Any) -> Lanes:
    """A float32 (LLVM value or Python number) in every lane."""
    if not isinstance(number, ir.Value):
        return Lanes(b, ir.Constant(FLOATS, [float(number)] * WIDTH))
    one = b.insert_element(ir.Constant(FLOATS, ir.Undefined), number, ir.Constant(_i32, 0))
    return Lanes(b, b.shuffle_vector(one, one, ir.Constant(WORDS, [0] * WIDTH)))


def first_lanes(b: Any, count: Any, start: int = 0) -> Any:
    """The mask of the lanes start + i < count; count: int64."""
    wanted = b.trunc(count, _i32)
    one = b.insert_element(ir.Constant(WORDS, ir.Undefined), wanted, ir.Constant(_i32, 0))
    all_wanted = b.shuffle_vector(one, one, ir.Constant(WORDS, [0] * WIDTH))
    return b.icmp_signed("<", ir.Constant(WORDS, list(range(start, start + WIDTH))), all_wanted)


def total(lanes: Lanes) -> Any:
    """The sum of all lanes, a float32: halves added to halves, in an order of its own."""
    b, value = lanes.b, lanes.value
    for half in (8, 4, 2, 1):
        moved = b.shuffle_vector(value, value, ir.Constant(WORDS, [(i + half) % WIDTH for i in range(WIDTH)]))
        value = b.fadd(value, moved)
    return b.extract_element(value, ir.Constant(_i32, 0))


def largest(lanes: Lanes) -> Any:
    """The largest of all lanes."""
    b = lanes.b
    for half in (8, 4, 2, 1):
        mask = ir.Constant(WORDS, [(i + half) % WIDTH for i in range(WIDTH)])
        lanes = lanes.larger(Lanes(b, b.shuffle_vector(lanes.value, lanes.value, mask)))
    return b.extract_element(lanes.value, ir.Constant(_i32, 0))


def store_number(b: Any, number: Any, address: Any, offset: int = 0) -> None:
    """One float32 at address + offset bytes."""
    b.store(number, place(b, address, offset, ir.FloatType()), align=4)


def store_first(lanes: Lanes, address: Any, offset: int = 0) -> None:
    """The first of the lanes at address + offset bytes."""
    store_number(lanes.b, lanes.b.extract_element(lanes.value, ir.Constant(_i32, 0)), address, offset)


def variable(b: Any, start: Lanes) -> Any:
    """A place that a loop can add to: read and write it with b.load and b.store of `.value`s."""
    return cgutils.alloca_once_value(b, start.value)


def each(b: Any, count: Any) -> Any:
    """A loop over 0 .. count - 1, int64: `with each(b, count) as loop: loop.index`."""
    return cgutils.for_range(b, count, intp=_i64)


def reciprocal(x: Lanes) -> Lanes:
    """1 / x for normal numbers whose reciprocal is normal too; largest error 1 ulp.

    With AVX-512 an estimate of 14 bits and a step of Newton's, which take a fraction of a division's time.
    """
    b = x.b
    if not _HAS_ESTIMATE:
        return Lanes(b, b.fdiv(spread(b, 1.0).value, x.value))
    estimate = function(b, "llvm.x86.avx512.rcp14.ps.512", FLOATS, [FLOATS, FLOATS, ir.IntType(16)])
    y = Lanes(b, b.call(estimate, [x.value, ir.Constant(FLOATS, [0.0] * WIDTH), ir.Constant(ir.IntType(16), -1)]))
    error = Lanes(b, b.fneg(x.value)).times_plus(y, 1.0)
    return y.times_plus(error, y)


def vectorised(*arguments: Any, result: Any = types.void) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: generate(b, *values), values of LLVM, becomes a function for jitted code with this signature."""

    def apply(generate: Callable[..., Any]) -> Any:
        def typed(typing_context: Any, *given: Any) -> Any:
            def build(context: Any, b: Any, signature: Any, values: Any) -> Any:
                value = generate(b, *values)
                return context.get_dummy_value() if result is types.void else value

            return result(*arguments), build

        typed.__name__, typed.__doc__ = generate.__name__, generate.__doc__
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = ["typing_context", *list(inspect.signature(generate).parameters)[1:]]
        typed.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        return intrinsic(typed)

    return apply
