"""Flush-to-zero and denormals-are-zero: set at the beginning of a compiled entry, restored at its end.

Subnormal numbers are computed in microcode: with subnormal moments AdamW was 59 times slower.
"""

from __future__ import annotations

import platform

import llvmlite.binding as llvm
import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_IS_ARM = platform.machine() in ("aarch64", "arm64")
_FLUSH = 1 << 24 if _IS_ARM else 0x8040  # FPCR.FZ; MXCSR.FTZ | MXCSR.DAZ
if _IS_ARM:
    llvm.initialize_native_asmparser()  # inline assembly needs it


def _read(b):
    i32, i64 = ir.IntType(32), ir.IntType(64)
    if _IS_ARM:
        return b.asm(ir.FunctionType(i64, []), "mrs $0, fpcr", "=r", [], True)
    place = cgutils.alloca_once(b, i32)
    store = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer()]), "llvm.x86.sse.stmxcsr"
    )
    b.call(store, [b.bitcast(place, ir.IntType(8).as_pointer())])
    return b.zext(b.load(place), i64)


def _write(b, value):
    i32 = ir.IntType(32)
    if _IS_ARM:
        b.asm(ir.FunctionType(ir.VoidType(), [ir.IntType(64)]), "msr fpcr, $0", "r", [value], True)
        return
    place = cgutils.alloca_once(b, i32)
    b.store(b.trunc(value, i32), place)
    load = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer()]), "llvm.x86.sse.ldmxcsr"
    )
    b.call(load, [b.bitcast(place, ir.IntType(8).as_pointer())])


@intrinsic
def flush_subnormals(typing_context):
    """Set both modes; returns the state before, for `restore`."""

    def generate(context, b, signature, arguments):
        before = _read(b)
        _write(b, b.or_(before, ir.Constant(ir.IntType(64), _FLUSH)))
        return before

    return types.int64(), generate


@intrinsic
def restore(typing_context, state):
    """Set the floating-point state that flush_subnormals returned."""

    def generate(context, b, signature, arguments):
        _write(b, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate
