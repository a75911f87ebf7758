"""Floating-point numbers as bits, in jitted code: casts, signs, powers of two, and products that are rounded alone.

Every function takes float32 or float64 and is one or a few instructions, which vectorise. `fma` is the one way to have
a product and a sum rounded once: where `element` (crystal/jit.py) compiles, nothing else fuses. On a CPU without the
instruction, LLVM calls the C library's fma, whose result is the same.
"""

from __future__ import annotations

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

_FORMATS = {types.float32: (32, 23, 127), types.float64: (64, 52, 1023)}  # bits, of the mantissa, bias


def _format(b, kind, value):
    """(LLVM type of whole numbers, bits, bits of the mantissa, bias, value as a whole number)."""
    bits, mantissa, bias = _FORMATS[kind]
    word = ir.IntType(bits)
    return word, bits, mantissa, bias, b.bitcast(value, word)


@intrinsic
def bits_of_float(typing_context, x):
    """The bits of a float32 as int32."""
    return types.int32(types.float32), lambda c, b, s, a: b.bitcast(a[0], ir.IntType(32))


@intrinsic
def float_of_bits(typing_context, x):
    """The float32 that has these bits."""
    return types.float32(types.int32), lambda c, b, s, a: b.bitcast(a[0], ir.FloatType())


@intrinsic
def bits_of_double(typing_context, x):
    """The bits of a float64 as int64."""
    return types.int64(types.float64), lambda c, b, s, a: b.bitcast(a[0], ir.IntType(64))


@intrinsic
def double_of_bits(typing_context, x):
    """The float64 that has these bits."""
    return types.float64(types.int64), lambda c, b, s, a: b.bitcast(a[0], ir.DoubleType())


@intrinsic
def fma(typing_context, x, y, z):
    """x * y + z, rounded once; of the kind of z."""
    return z(z, z, z), lambda c, b, s, a: b.fma(*a)


@intrinsic
def magnitude(typing_context, x):
    """|x|."""

    def generate(context, b, signature, arguments):
        word, bits, _, _, value = _format(b, signature.return_type, arguments[0])
        return b.bitcast(b.and_(value, ir.Constant(word, (1 << (bits - 1)) - 1)), arguments[0].type)

    return x(x), generate


@intrinsic
def signed_as(typing_context, x, y):
    """x >= 0 with the sign of y: -x where y is negative or -0."""

    def generate(context, b, signature, arguments):
        word, bits, _, _, value = _format(b, signature.return_type, arguments[1])
        sign = b.and_(value, ir.Constant(word, 1 << (bits - 1)))
        return b.bitcast(b.xor(b.bitcast(arguments[0], word), sign), arguments[0].type)

    return x(x, x), generate


@intrinsic
def turned(typing_context, x, n):
    """x, and -x where bit 1 of the int64 n is set."""

    def generate(context, b, signature, arguments):
        word, bits, _, _, value = _format(b, signature.return_type, arguments[0])
        n = b.trunc(arguments[1], word) if bits < 64 else arguments[1]
        sign = b.shl(b.and_(n, ir.Constant(word, 2)), ir.Constant(word, bits - 2))
        return b.bitcast(b.xor(value, sign), arguments[0].type)

    return x(x, types.int64), generate


@intrinsic
def scaled(typing_context, x, rounded):
    """x * 2.0**n for `rounded` = n + 1.5 * 2**23 (float32; 2**52 in float64); x and the result have to be normal.

    Adding that constant rounds to a whole number n, which then stands in the lowest bits.
    """

    def generate(context, b, signature, arguments):
        word, _, mantissa, _, value = _format(b, x, arguments[0])
        n = b.shl(b.bitcast(arguments[1], word), ir.Constant(word, mantissa))
        return b.bitcast(b.add(value, n), arguments[0].type)

    return x(x, x), generate


@intrinsic
def low_bits(typing_context, rounded):
    """n modulo 2**22 or 2**51, int64, for `rounded` as in `scaled`."""

    def generate(context, b, signature, arguments):
        *_, value = _format(b, signature.args[0], arguments[0])
        return value if value.type.width == 64 else b.zext(value, ir.IntType(64))

    return types.int64(rounded), generate


def _binade(b, word, mantissa, value):
    """n as a word, and m's bits, with x = m * 2**n and m in [sqrt(1/2), sqrt(2))."""
    root = 0x3FE6A09E667F3BCD if mantissa == 52 else 0x3F3504F3
    shift = ir.Constant(word, mantissa)
    n = b.ashr(b.sub(value, ir.Constant(word, root)), shift)
    return n, b.sub(value, b.shl(n, shift))


@intrinsic
def binade(typing_context, x):
    """n as a float of x's kind, with x = m * 2**n and m in [sqrt(1/2), sqrt(2)), for normal x > 0."""

    def generate(context, b, signature, arguments):
        word, _, mantissa, _, value = _format(b, x, arguments[0])
        return b.sitofp(_binade(b, word, mantissa, value)[0], arguments[0].type)

    return x(x), generate


@intrinsic
def in_binade(typing_context, x):
    """m of `binade`."""

    def generate(context, b, signature, arguments):
        word, _, mantissa, _, value = _format(b, x, arguments[0])
        return b.bitcast(_binade(b, word, mantissa, value)[1], arguments[0].type)

    return x(x), generate


@intrinsic
def high_product(typing_context, x, y):
    """The upper 64 bits of the product of two uint64."""

    def generate(context, b, signature, arguments):
        wide = ir.IntType(128)
        product = b.mul(*(b.zext(a, wide) for a in arguments))
        return b.trunc(b.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate
