"""Two packed strips of float32 -> a tile of their product; and matrices -> packed strips. Written as LLVM IR.

A tile has up to 14 rows and 32 columns: 28 sums, two vectors of B and two elements of A, each in all lanes, fill the
32 registers of AVX-512. Every element of a tile is one chain of fused multiply-adds over k in order, beginning with
what is to be added: its bits do not depend on how a matrix is cut into tiles, nor on alignment.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from cllm_spheres.crystal.lanes import constant, first_lanes, function
from cllm_spheres.kernels.sizes import TILE_COLUMNS, TILE_ROWS

LANES = 16
TILE_VECTORS = TILE_COLUMNS // LANES

F32, I1, I8, I32, I64 = ir.FloatType(), ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64)
VOID = ir.VoidType()
VECTOR, MASK = ir.VectorType(F32, LANES), ir.VectorType(I1, LANES)
BYTES = I8.as_pointer()
ZERO = ir.Constant(VECTOR, [0.0] * LANES)


def spread(b: Any, value: Any, vector: Any) -> Any:
    """A vector with `value` in every lane."""
    one = b.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
    return b.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


def load(b: Any, place: Any, mask: Any = None) -> Any:
    """16 floats at a byte pointer; lanes outside the mask are zero and not read."""
    place = b.bitcast(place, VECTOR.as_pointer())
    if mask is None:
        return b.load(place, align=4)
    read = function(b, "llvm.masked.load.v16f32.p0", VECTOR, [VECTOR.as_pointer(), I32, MASK, VECTOR])
    return b.call(read, [place, ir.Constant(I32, 4), mask, ZERO])


def store(b: Any, value: Any, place: Any, mask: Any = None) -> None:
    """16 floats to a byte pointer; lanes outside the mask are not written."""
    place = b.bitcast(place, VECTOR.as_pointer())
    if mask is None:
        b.store(value, place, align=4)
        return
    write = function(b, "llvm.masked.store.v16f32.p0", VOID, [VECTOR, VECTOR.as_pointer(), I32, MASK])
    b.call(write, [value, place, ir.Constant(I32, 4), mask])


def at(b: Any, pointer: Any, offset: Any) -> Any:
    """The byte pointer `offset` bytes on."""
    return b.gep(pointer, [constant(offset) if isinstance(offset, int) else offset])


def counted(b: Any, count: Any, carried: list[tuple[Any, Any]], body: Any) -> list[Any]:
    """body(b, values) -> new values, `count` >= 0 times; carried: (type, first value). Returns the last values."""
    before, loop, done = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
    b.cbranch(b.icmp_signed(">", count, constant(0)), loop, done)
    b.position_at_end(loop)
    left = b.phi(I64)
    left.add_incoming(count, before)
    phis = [b.phi(kind) for kind, _ in carried]
    for phi, (_, first) in zip(phis, carried, strict=True):
        phi.add_incoming(first, before)
    new = body(b, phis)
    next_left = b.sub(left, constant(1))
    end = b.block
    left.add_incoming(next_left, end)
    for phi, value in zip(phis, new, strict=True):
        phi.add_incoming(value, end)
    b.cbranch(b.icmp_signed(">", next_left, constant(0)), loop, done)
    b.position_at_end(done)
    results = [b.phi(kind) for kind, _ in carried]
    for phi, (_, first), value in zip(results, carried, new, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(value, end)
    return results


# k, a, step_a, b, step_b, start, step_start, bias, c, step_c, columns. Steps in bytes, addresses as int64.
TILE_ARGUMENTS = 11
FETCHED_AHEAD = 4096  # bytes


def _tile(module: Any, rows: int, vectors: int, halves: bool = False) -> Any:
    """The function for a tile of `rows` rows and at most 16 * vectors columns, made once a module.

    halves: B holds 32 columns as bfloat16, word i of a row those of columns i (its low half) and 16 + i.
    """
    name = f"cllm_spheres_tile_{rows}_{vectors}{'_halves' if halves else ''}"
    if name in module.globals:
        return module.globals[name]
    made = ir.Function(module, ir.FunctionType(VOID, [I64] * TILE_ARGUMENTS), name)
    made.linkage = "internal"
    made.attributes.add("noinline")
    b = ir.IRBuilder(made.append_basic_block())
    k, a, step_a, bb, step_b, start, step_start, bias, c, step_c, columns = made.args
    masks = [first_lanes(b, columns, LANES * v) for v in range(vectors)]
    no, yes = ir.Constant(MASK, [0] * LANES), ir.Constant(MASK, [1] * LANES)

    def where(address: Any) -> Any:
        return [b.and_(m, b.select(b.icmp_signed("!=", address, constant(0)), yes, no)) for m in masks]

    start_masks, bias_masks = where(start), where(bias)
    # Where nothing is to be read the mask is empty, and the address is C's: the CPU takes long over an absent page.
    start, bias = (b.select(b.icmp_signed("==", x, constant(0)), c, x) for x in (start, bias))
    bias_pointer = b.inttoptr(bias, BYTES)
    biases = [load(b, at(b, bias_pointer, 64 * v), m) for v, m in enumerate(bias_masks)]
    row = b.inttoptr(start, BYTES)
    first = []
    for i in range(rows):
        for v, m in enumerate(start_masks):
            first.append((VECTOR, b.fadd(load(b, at(b, row, 64 * v), m), biases[v])))
        if i + 1 < rows:
            row = b.gep(row, [step_start])
    fma = function(b, "llvm.fma.v16f32", VECTOR, [VECTOR, VECTOR, VECTOR])
    fetch = function(b, "llvm.prefetch.p0", VOID, [BYTES, I32, I32, I32])

    def step(b: Any, values: list[Any]) -> list[Any]:
        a_now, b_now, *sums = values
        if halves and rows == 1:  # the chain is short, so the CPU by itself does not look far enough ahead
            b.call(fetch, [at(b, b_now, FETCHED_AHEAD), *(ir.Constant(I32, flag) for flag in (0, 3, 1))])
        columns_of_b = _widened(b, b_now) if halves else [load(b, at(b, b_now, 64 * v)) for v in range(vectors)]
        new = []
        for i in range(rows):
            element = b.load(b.bitcast(at(b, a_now, 4 * i), F32.as_pointer()), align=4)
            wide = spread(b, element, VECTOR)
            new += [b.call(fma, [wide, columns_of_b[v], sums[i * vectors + v]]) for v in range(vectors)]
        return [b.gep(a_now, [step_a]), b.gep(b_now, [step_b]), *new]

    pointers = [(BYTES, b.inttoptr(a, BYTES)), (BYTES, b.inttoptr(bb, BYTES))]
    _, _, *sums = counted(b, k, [*pointers, *first], step)
    row = b.inttoptr(c, BYTES)
    for i in range(rows):
        for v in range(vectors):
            store(b, sums[i * vectors + v], at(b, row, 64 * v), masks[v])
        if i + 1 < rows:
            row = b.gep(row, [step_c])
    b.ret_void()
    return made


def _widened(b: Any, place: Any) -> list[Any]:
    """16 words of two bfloat16 each -> two vectors of float32."""
    words = ir.VectorType(I32, LANES)
    pairs = b.load(b.bitcast(place, words.as_pointer()), align=4)
    low = b.shl(pairs, ir.Constant(words, [16] * LANES))
    high = b.and_(pairs, ir.Constant(words, [-65536] * LANES))
    return [b.bitcast(half, VECTOR) for half in (low, high)]


def _cases(b: Any, rows: Any, vectors: Any, kinds: Any, call: Any) -> None:
    """call(count, wide) for the one of 1..14 rows and of `kinds` vectors that is asked for."""
    here, done = b.block, b.append_basic_block("tiled")
    cases = []
    for count in range(1, TILE_ROWS + 1):
        for wide in kinds:
            block = b.append_basic_block(f"tile{count}x{wide}")
            b.position_at_end(block)
            call(count, wide)
            b.branch(done)
            cases.append((4 * count + wide, block))
    b.position_at_end(here)
    switch = b.switch(b.add(b.mul(rows, constant(4)), vectors), done)
    for value, block in cases:
        switch.add_case(constant(value), block)
    b.position_at_end(done)


@intrinsic
def tile(typing_context, rows, k, a, step_a, b, step_b, start, step_start, bias, c, step_c, columns):
    """C[rows, columns] = start + bias + A[rows, k] B[k, columns].

    rows 1..14, columns 1..32; all int64, addresses and steps in bytes. A: element (i, k) at a + k step_a + 4 i. B: row
    k at b + k step_b, 16 floats or, for more than 16 columns, 32, all of which are read. start: row i at
    start + i step_start; bias: one row; an address of 0 is zero. C may be start.
    """

    def generate(context, b, signature, arguments):
        rows, *rest = arguments
        vectors = b.lshr(b.add(rest[-1], constant(LANES - 1)), constant(4))
        _cases(
            b, rows, vectors, range(1, TILE_VECTORS + 1),
            lambda count, wide: b.call(_tile(b.module, count, wide), rest),
        )  # fmt: skip
        return context.get_dummy_value()

    return types.void(*[types.int64] * (TILE_ARGUMENTS + 1)), generate


@intrinsic
def tile_of_halves(typing_context, rows, k, a, step_a, b, step_b, start, step_start, bias, c, step_c, columns):
    """`tile` where B is bfloat16: a row of 32 columns is 16 words, in word i those of columns i (low) and 16 + i."""

    def generate(context, b, signature, arguments):
        rows, *rest = arguments
        _cases(
            b, rows, constant(TILE_VECTORS), (TILE_VECTORS,),
            lambda count, wide: b.call(_tile(b.module, count, wide, halves=True), rest),
        )  # fmt: skip
        return context.get_dummy_value()

    return types.void(*[types.int64] * (TILE_ARGUMENTS + 1)), generate


def _shuffle(b: Any, x: Any, y: Any, lanes: list[int]) -> Any:
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, LANES), lanes))


def _transposed(b: Any, rows: list[Any]) -> list[Any]:
    """16 vectors as the rows of a 16 x 16 matrix -> its columns, in 64 shuffles of one instruction each."""
    low = [4 * q + x for q in range(4) for x in (0, 16, 1, 17)]  # of each quarter: a0 b0 a1 b1
    high = [4 * q + x for q in range(4) for x in (2, 18, 3, 19)]
    pairs_low = [4 * q + x for q in range(4) for x in (0, 1, 16, 17)]
    pairs_high = [4 * q + x for q in range(4) for x in (2, 3, 18, 19)]
    fours = []  # fours[g][c], quarter q: column 4 q + c of rows 4 g to 4 g + 3
    for g in range(0, LANES, 4):
        r0, r1, r2, r3 = rows[g : g + 4]
        a, c = _shuffle(b, r0, r1, low), _shuffle(b, r2, r3, low)
        d, e = _shuffle(b, r0, r1, high), _shuffle(b, r2, r3, high)
        fours.append([_shuffle(b, x, y, p) for x, y in ((a, c), (d, e)) for p in (pairs_low, pairs_high)])
    halves = [list(range(8)) + list(range(16, 24)), list(range(8, 16)) + list(range(24, 32))]
    even = [x for q in (0, 2, 4, 6) for x in range(4 * q, 4 * q + 4)]
    odd = [x + 4 for x in even]
    columns: list[Any] = [None] * LANES
    for c in range(4):
        for half in range(2):
            x = _shuffle(b, fours[0][c], fours[1][c], halves[half])
            y = _shuffle(b, fours[2][c], fours[3][c], halves[half])
            columns[8 * half + c] = _shuffle(b, x, y, even)
            columns[8 * half + 4 + c] = _shuffle(b, x, y, odd)
    return columns


@intrinsic
def pack_rows(typing_context, k, source, step, rows, target, target_step):
    """target[j] = column j of a matrix of `rows` rows (1..16) and k columns, as 16 floats every target_step bytes.

    Behind the rows stand copies of the last one. Target needs room for k rounded up to 16.
    """

    def generate(context, b, signature, arguments):
        k, source, step, rows, target, target_step = arguments
        last = b.sub(rows, constant(1))
        base, places = b.inttoptr(source, BYTES), []
        for i in range(LANES):
            i = b.select(b.icmp_signed("<", constant(i), last), constant(i), last)
            places.append(b.gep(base, [b.mul(i, step)]))

        def sixteen(b: Any, values: list[Any]) -> list[Any]:
            offset, left, place = values
            mask = first_lanes(b, left)
            for vector in _transposed(b, [load(b, b.gep(row, [offset]), mask) for row in places]):
                store(b, vector, place)
                place = b.gep(place, [target_step])
            return [b.add(offset, constant(4 * LANES)), b.sub(left, constant(LANES)), place]

        times = b.lshr(b.add(k, constant(LANES - 1)), constant(4))
        counted(b, times, [(I64, constant(0)), (I64, k), (BYTES, b.inttoptr(target, BYTES))], sixteen)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@intrinsic
def pack_columns(typing_context, k, source, step, columns, target, target_step):
    """target[j] = row j of a matrix of k rows and `columns` columns (1..16): 16 floats, zeros behind the columns."""

    def generate(context, b, signature, arguments):
        k, source, step, columns, target, target_step = arguments
        mask = first_lanes(b, columns)

        def one(b: Any, values: list[Any]) -> list[Any]:
            place, into = values
            store(b, load(b, place, mask), into)
            return [b.gep(place, [step]), b.gep(into, [target_step])]

        counted(b, k, [(BYTES, b.inttoptr(source, BYTES)), (BYTES, b.inttoptr(target, BYTES))], one)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate
