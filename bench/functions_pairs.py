"""Rows of numbers that are sums of two float64, right to about 2**-100: products, sums, quotients, series.

A pair is (high, low), two arrays; the loops vectorise. Source: Dekker, A floating-point technique (1971).
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from cllm_spheres.crystal.functions.bits import double_of_bits, fma
from cllm_spheres.crystal.functions.reals import parts
from cllm_spheres.crystal.jit import element

Pair = tuple[np.ndarray, np.ndarray]
Scaled = tuple[np.ndarray, np.ndarray, np.ndarray]  # a pair, and the power of two that it is to be multiplied with


@element
def _times(a, a_rest, b, b_rest):
    high = a * b
    low = fma(a, b, -high) + fma(a, b_rest, a_rest * b)
    top = high + low
    return top, low - (top - high)


@element
def _plus(a, a_rest, b, b_rest):
    high = a + b
    other = high - a
    low = (a - (high - other)) + (b - other) + (a_rest + b_rest)
    top = high + low
    return top, low - (top - high)


@element
def multiply(a_N, a_rest_N, b_N, b_rest_N, out_N, rest_N):
    """out = a * b."""
    for i in range(a_N.size):
        out_N[i], rest_N[i] = _times(a_N[i], a_rest_N[i], b_N[i], b_rest_N[i])


@element
def add(a_N, a_rest_N, b_N, b_rest_N, out_N, rest_N):
    """out = a + b."""
    for i in range(a_N.size):
        out_N[i], rest_N[i] = _plus(a_N[i], a_rest_N[i], b_N[i], b_rest_N[i])


@element
def divide(a_N, a_rest_N, b_N, b_rest_N, out_N, rest_N):
    """out = a / b."""
    for i in range(a_N.size):
        q = a_N[i] / b_N[i]
        p, p_rest = _times(q, 0.0, b_N[i], b_rest_N[i])
        left = ((a_N[i] - p) - p_rest) + a_rest_N[i]
        second = left / b_N[i]
        out_N[i] = q + second
        rest_N[i] = second - (out_N[i] - q)


@element
def polynomial(c_K, c_rest_K, x_N, x_rest_N, out_N, rest_N):
    """out = the polynomial of x with coefficients c, the lowest first."""
    last = c_K.size - 1
    for i in range(x_N.size):
        out_N[i], rest_N[i] = c_K[last], c_rest_K[last]
    for k in range(last - 1, -1, -1):
        c, c_rest = c_K[k], c_rest_K[k]
        for i in range(x_N.size):
            p, p_rest = _times(out_N[i], rest_N[i], x_N[i], x_rest_N[i])
            out_N[i], rest_N[i] = _plus(c, c_rest, p, p_rest)


@element
def reduce(x_N, x_rest_N, log2_e, a, b, c, n_N, out_N, rest_N):
    """out = x - n (a + b + c) with the whole n nearest to x / ln 2."""
    for i in range(x_N.size):
        n = np.rint(x_N[i] * log2_e)
        p, q = n * b, n * c
        first = fma(n, -a, x_N[i])
        high, low = _plus(first, 0.0, -p, -fma(n, b, -p))
        n_N[i] = n
        out_N[i], rest_N[i] = _plus(high, low, x_rest_N[i], -q)


@element
def quarters(x_N, two_over_pi, a, b, c, n_N, out_N, rest_N):
    """x = n pi/2 + out, for |x| up to NEAR, with pi/2 = a + b + c."""
    for i in range(x_N.size):
        n = np.rint(x_N[i] * two_over_pi)
        p = n * b
        high, low = _plus(fma(n, -a, x_N[i]), 0.0, -p, -fma(n, b, -p))
        n_N[i] = n
        out_N[i], rest_N[i] = _plus(high, low, -n * c, 0.0)


@element
def scale(m_N, m_rest_N, n_N, out_N, rest_N):
    """out = m * 2**n, n within 2,140 of zero."""
    for i in range(n_N.size):
        n = np.int64(n_N[i])
        half = n >> 1
        first, second = double_of_bits((half + 1023) << 52), double_of_bits((n - half + 1023) << 52)
        out_N[i], rest_N[i] = m_N[i] * first * second, m_rest_N[i] * first * second


def scaled(n: np.ndarray, m: Pair) -> Pair:
    return call(scale, *m, np.clip(n, -2040, 2040))


def call(kernel: Any, *arguments: Any) -> Pair:
    """A kernel of rows with two rows to write."""
    out, rest = np.empty(arguments[-1].size), np.empty(arguments[-1].size)
    kernel(*arguments, out, rest)
    return out, rest


@cache
def coefficients(values: tuple[Fraction, ...]) -> Pair:
    high, low = zip(*(parts(value, 2) for value in values), strict=True)
    return np.array(high), np.array(low)


def of_number(value: Fraction, like: np.ndarray) -> Pair:
    high, low = parts(value, 2)
    return np.full(like.size, high), np.full(like.size, low)


def add_number(a: Pair, number: float) -> Pair:
    return call(add, *a, np.full(a[0].size, number), np.zeros(a[0].size))
