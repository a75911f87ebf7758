"""An address -> an array over it; and a few row operations that the other kernels share."""

from __future__ import annotations

import llvmlite.ir as ir
import numpy as np
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from cllm_spheres.crystal.functions import exp
from cllm_spheres.crystal.jit import kernel, reduction
from cllm_spheres.text.batches import pointer

f4 = np.float32
LANES = 16


@kernel
def floats(address, n):
    """float32[n] at an address."""
    return carray(pointer(address), n, np.float32)


@kernel
def matrix(address, rows, columns):
    """float32[rows, columns] at an address, rows contiguous."""
    return carray(pointer(address), (rows, columns), np.float32)


@kernel
def doubles(address, n):
    """float64[n] at an address."""
    return carray(pointer(address), n, np.float64)


@kernel
def integers(address, n):
    """int64[n] at an address."""
    return carray(pointer(address), n, np.int64)


@kernel
def tokens(address, n):
    """int32[n] at an address."""
    return carray(pointer(address), n, np.int32)


@intrinsic
def row_max_at(typing_context, address, n):
    """The largest of n float32 at an address, 16 at a time; NaN is passed over (exp(x - max) keeps it)."""

    def generate(context, b, signature, arguments):
        vector = ir.VectorType(ir.FloatType(), LANES)
        i64, pointer_type = ir.IntType(64), ir.FloatType().as_pointer()
        base, count = b.inttoptr(arguments[0], pointer_type), arguments[1]
        lowest = float(np.finfo(np.float32).min)
        best = cgutils.alloca_once_value(b, ir.Constant(vector, [lowest] * LANES))
        whole = b.and_(count, ir.Constant(i64, ~(LANES - 1)))
        with cgutils.for_range_slice(b, ir.Constant(i64, 0), whole, ir.Constant(i64, LANES)) as (i, _):
            x = b.load(b.bitcast(b.gep(base, [i]), vector.as_pointer()), align=4)
            old = b.load(best)
            b.store(b.select(b.fcmp_ordered(">", x, old), x, old), best)
        reduce = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(ir.FloatType(), [vector]), "llvm.vector.reduce.fmax.v16f32"
        )
        result = cgutils.alloca_once_value(b, b.call(reduce, [b.load(best)]))
        with cgutils.for_range_slice(b, whole, count, ir.Constant(i64, 1)) as (i, _):
            y = b.load(b.gep(base, [i]), align=4)
            old_one = b.load(result)
            b.store(b.select(b.fcmp_ordered(">", y, old_one), y, old_one), result)
        return b.load(result)

    return types.float32(types.int64, types.int64), generate


@kernel
def row_max(row):
    """The largest element of a contiguous float32 row, at least one long."""
    return row_max_at(row.ctypes.data, row.size)


@reduction
def exp_of_difference(row, shift, scale, n):
    """row[:n] = exp((row[:n] - shift) * scale) in place; the sum of what was written."""
    total = f4(0)
    for j in range(n):
        e = exp((row[j] - shift) * scale)
        row[j] = e
        total += e
    return total


@reduction
def dot(x, y):
    """Sum of x * y over two rows."""
    total = f4(0)
    for j in range(x.size):
        total += x[j] * y[j]
    return total


@kernel
def scale_row(row, factor, n):
    """row[:n] *= factor."""
    for j in range(n):
        row[j] *= factor


@kernel
def add_rows(dout_NC, db_C, accumulate):
    """db_C (+)= the sum of the rows of dout_NC, in row order; `accumulate` false overwrites."""
    if not accumulate:
        db_C[:] = f4(0)
    for i in range(dout_NC.shape[0]):
        row = dout_NC[i]
        for j in range(row.size):
            db_C[j] += row[j]
