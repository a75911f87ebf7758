"""Atomic words in shared memory and futex waits, for jitted code and for Node Zero.

Words are int64 at addresses that are multiples of 8. A futex looks at the low 32 bits of its word (both machines
that we run on are little-endian).
"""

from __future__ import annotations

import platform

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cllm_spheres.crystal.jit import kernel

_IS_ARM = platform.machine() in ("aarch64", "arm64")
_SYS_FUTEX = 98 if _IS_ARM else 202
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_EVERYBODY = 2**31 - 1
_i8 = types.int64
_syscall = types.ExternalFunction("syscall", _i8(_i8, _i8, _i8, _i8, _i8, _i8, _i8))
_I64 = ir.IntType(64)


@intrinsic
def load(typing_context, address):
    """The word at an address; what its writer wrote before storing it is seen too (acquire)."""

    def generate(context, b, signature, arguments):
        return b.load_atomic(b.inttoptr(arguments[0], _I64.as_pointer()), "acquire", 8)

    return _i8(_i8), generate


@intrinsic
def store(typing_context, address, value):
    """Write a word; whoever loads it sees all that was written before (release)."""

    def generate(context, b, signature, arguments):
        b.store_atomic(arguments[1], b.inttoptr(arguments[0], _I64.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(_i8, _i8), generate


@intrinsic
def add(typing_context, address, value):
    """Add to a word; returns what stood there before."""

    def generate(context, b, signature, arguments):
        return b.atomic_rmw("add", b.inttoptr(arguments[0], _I64.as_pointer()), arguments[1], "seq_cst")

    return _i8(_i8, _i8), generate


@intrinsic
def exchange_if(typing_context, address, expected, value):
    """Write `value` where the word is `expected`; returns what stood there before."""

    def generate(context, b, signature, arguments):
        place = b.inttoptr(arguments[0], _I64.as_pointer())
        pair = b.cmpxchg(place, arguments[1], arguments[2], "seq_cst", "seq_cst")
        return b.extract_value(pair, 0)

    return _i8(_i8, _i8, _i8), generate


@intrinsic
def pause(typing_context):
    """Tell the core that this is a spinning loop."""

    def generate(context, b, signature, arguments):
        if not _IS_ARM:
            void = ir.FunctionType(ir.VoidType(), [])
            b.call(cgutils.get_or_insert_function(b.module, void, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


@kernel
def wake_all(address):
    """Wake everyone who waits on a word."""
    _syscall(_SYS_FUTEX, address, _FUTEX_WAKE, _EVERYBODY, 0, 0, 0)


@kernel
def wait_while(address, value, timeout):
    """Sleep while the word is `value`, until woken or for the time that stands at `timeout` (seconds, ns: int64[2])."""
    _syscall(_SYS_FUTEX, address, _FUTEX_WAIT, value & 0xFFFFFFFF, timeout, 0, 0)


@kernel
def load_word(address):
    """`load` for Python."""
    return load(address)


@kernel
def store_word(address, value):
    """`store` for Python."""
    store(address, value)


@kernel
def add_to_word(address, value):
    """`add` for Python."""
    return add(address, value)


@kernel
def exchange_word(address, expected, value):
    """`exchange_if` for Python."""
    return exchange_if(address, expected, value)
