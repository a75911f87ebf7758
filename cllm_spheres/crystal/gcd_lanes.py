"""One number and a row of numbers -> their greatest common divisors, 64 to 256 pairs at a time.

The binary algorithm of `primes.gcd` in vectors of 512 bits: each step takes the smaller of both and what is left of
their difference without its zeros, until no lane has a difference. Several vectors go at once, as each step waits for
the one before. Whole numbers: the result does not depend on the width of the lanes.
"""

# N, M numbers

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.crystal.lanes import constant, function, place, vectorised

VECTORS = 8  # at once; measured on Zen 5: 4 take 1.4 times as long a pair, 12 a tenth more
GROUP = VECTORS * 32  # a row's length is a multiple of it, whatever the width of a lane


def _spread(b: Any, number: Any, kind: Any) -> Any:
    """A number in every lane."""
    one = b.insert_element(ir.Constant(kind, ir.Undefined), number, constant(0))
    return b.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count))


def _rows_of(bits: int) -> Any:
    lanes = 512 // bits
    word, kind = ir.IntType(bits), ir.VectorType(ir.IntType(bits), lanes)
    zero = ir.Constant(kind, [0] * lanes)
    mask = ir.IntType(lanes)

    def zeros_of(b: Any, x: Any) -> Any:
        """How many zeros end each lane; a lane that is 0 has no answer, and must not be looked at."""
        count_zeros = function(b, f"llvm.cttz.v{lanes}i{bits}", kind, [kind, ir.IntType(1)])
        return b.call(count_zeros, [x, ir.Constant(ir.IntType(1), 1)])

    def smaller(b: Any, x: Any, y: Any) -> Any:
        return b.select(b.icmp_unsigned("<", x, y), x, y)

    def larger(b: Any, x: Any, y: Any) -> Any:
        return b.select(b.icmp_unsigned("<", x, y), y, x)

    def generate(b: Any, a: Any, row: Any, out: Any, count: Any) -> None:
        """out[i] = gcd(a, row[i]); a > 0, count a multiple of 8 vectors; row and out are addresses of lanes."""
        a = _spread(b, b.trunc(a, word) if bits < 64 else a, kind)
        zeros_of_a = zeros_of(b, a)
        odd = b.lshr(a, zeros_of_a)
        step = VECTORS * lanes
        with cgutils.for_range_slice(b, constant(0), count, constant(step), intp=ir.IntType(64)) as (i, _):
            start = b.mul(i, constant(bits // 8))
            twos, xs, ys = [], [], []
            for v in range(VECTORS):
                number = b.load(place(b, b.add(row, start), v * 64, kind), align=bits // 8)
                number = b.select(b.icmp_unsigned("==", number, zero), a, number)  # gcd(a, 0) = a = gcd(a, a)
                zeros = zeros_of(b, number)
                twos.append(smaller(b, zeros_of_a, zeros))
                xs.append(cgutils.alloca_once_value(b, odd))
                ys.append(cgutils.alloca_once_value(b, b.lshr(number, zeros)))
            again, end = b.append_basic_block("again"), b.append_basic_block("end")
            b.branch(again)
            b.position_at_end(again)
            open_lanes = ir.Constant(mask, 0)
            for x_place, y_place in zip(xs, ys, strict=True):
                x, y = b.load(x_place), b.load(y_place)
                low = smaller(b, x, y)
                difference = b.sub(larger(b, x, y), low)
                is_open = b.icmp_unsigned("!=", difference, zero)
                b.store(low, x_place)
                b.store(b.select(is_open, b.lshr(difference, zeros_of(b, difference)), low), y_place)
                open_lanes = b.or_(open_lanes, b.bitcast(is_open, mask))
            b.cbranch(b.icmp_unsigned("!=", open_lanes, ir.Constant(mask, 0)), again, end)
            b.position_at_end(end)
            for v in range(VECTORS):
                common = b.shl(b.load(xs[v]), twos[v])
                b.store(common, place(b, b.add(out, start), v * 64, kind), align=bits // 8)

    return vectorised(types.int64, types.int64, types.int64, types.int64)(generate)


_row_16, _row_32, _row_64 = _rows_of(16), _rows_of(32), _rows_of(64)


@kernel
def gcd_rows(a_N, b_M, row_M, out_NM):
    """out = gcd(a, b) for every a and b. b, row: unsigned of 2, 4 or 8 bytes, which a fits too; row is scratch.

    b is longer than out: padded with zeros to a multiple of GROUP.
    """
    for i in range(a_N.size):
        a = a_N[i]
        if a == 0:
            for j in range(b_M.size):
                row_M[j] = b_M[j]
        elif b_M.itemsize == 2:
            _row_16(a, b_M.ctypes.data, row_M.ctypes.data, b_M.size)
        elif b_M.itemsize == 4:
            _row_32(a, b_M.ctypes.data, row_M.ctypes.data, b_M.size)
        else:
            _row_64(a, b_M.ctypes.data, row_M.ctypes.data, b_M.size)
        for j in range(out_NM.shape[1]):
            out_NM[i, j] = np.int64(row_M[j])
