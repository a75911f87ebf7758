"""(seed, purpose, step, index) -> random numbers, permutations and normals, without any state.

A number is a hash of its coordinates, so that every process that asks gets the same one, in any order: that is
what makes the batch of step n a function of n. numpy's distributions may change between versions; these do not.
"""

from __future__ import annotations

import math

import numpy as np

from cllm_spheres.crystal.functions.double import log
from cllm_spheres.crystal.jit import kernel

u8 = np.uint64
# What a number is for: streams with different purposes are independent.
PURPOSE_WEIGHTS, PURPOSE_OFFSET, PURPOSE_ORDER, PURPOSE_DROPOUT, PURPOSE_SAMPLING, PURPOSE_NEIGHBOURS = range(1, 7)

GOLDEN = u8(0x9E3779B97F4A7C15)
MIX_1, MIX_2 = u8(0xBF58476D1CE4E5B9), u8(0x94D049BB133111EB)
S27, S30, S31, S12, S32 = u8(27), u8(30), u8(31), u8(12), u8(32)
LOW_32 = u8(0xFFFFFFFF)
TWO_TO_MINUS_52 = 2.0**-52


@kernel
def mix(x):
    """A bijection of 64-bit numbers that looks random. Source: Steele et al., SplitMix64 (2014)."""
    x = (x ^ (x >> S30)) * MIX_1
    x = (x ^ (x >> S27)) * MIX_2
    return x ^ (x >> S31)


@kernel
def combine(key, value):
    """A new key from a key and one more coordinate, both 64 bits."""
    return mix(key * GOLDEN + mix(u8(value) + GOLDEN))


@kernel
def key_of(seed, purpose, step):
    """The key of one purpose at one step."""
    return combine(combine(u8(seed), u8(purpose)), u8(step))


@kernel
def uniform(key, index):
    """A float64 in the open interval (0, 1): 52 bits and a half, so that the largest does not round to 1."""
    return (np.float64(combine(key, u8(index)) >> S12) + 0.5) * TWO_TO_MINUS_52


@kernel
def normal(key, index):
    """A float64 from the standard normal distribution: the inverse of its distribution function at a uniform.

    Source: Wichura, Algorithm AS 241 (1988), routine PPND16; relative accuracy about 1e-16.
    """
    p = uniform(key, index)
    q = p - 0.5
    if abs(q) <= 0.425:
        r = 0.180625 - q * q
        top = ((((((2.5090809287301226727e3 * r + 3.3430575583588128105e4) * r + 6.7265770927008700853e4) * r
                  + 4.5921953931549871457e4) * r + 1.3731693765509461125e4) * r + 1.9715909503065514427e3) * r
               + 1.3314166789178437745e2) * r + 3.3871328727963666080  # fmt: skip
        low = ((((((5.2264952788528545610e3 * r + 2.8729085735721942674e4) * r + 3.9307895800092710610e4) * r
                  + 2.1213794301586595867e4) * r + 5.3941960214247511077e3) * r + 6.8718700749205790830e2) * r
               + 4.2313330701600911252e1) * r + 1.0  # fmt: skip
        return q * top / low
    r = p if q < 0 else 1.0 - p
    r = math.sqrt(-log(r))
    if r <= 5.0:
        r -= 1.6
        top = ((((((7.74545014278341407640e-4 * r + 2.27238449892691845833e-2) * r + 2.41780725177450611770e-1) * r
                  + 1.27045825245236838258) * r + 3.64784832476320460504) * r + 5.76949722146069140550) * r
               + 4.63033784615654529590) * r + 1.42343711074968357734  # fmt: skip
        low = ((((((1.05075007164441684324e-9 * r + 5.47593808499534494600e-4) * r + 1.51986665636164571966e-2) * r
                  + 1.48103976427480074590e-1) * r + 6.89767334985100004550e-1) * r + 1.67638483018380384940) * r
               + 2.05319162663775882187) * r + 1.0  # fmt: skip
    else:
        r -= 5.0
        top = ((((((2.01033439929228813265e-7 * r + 2.71155556874348757815e-5) * r + 1.24266094738807843860e-3) * r
                  + 2.65321895265761230930e-2) * r + 2.96560571828504891230e-1) * r + 1.78482653991729133580) * r
               + 5.46378491116411436990) * r + 6.65790464350110377720  # fmt: skip
        low = ((((((2.04426310338993978564e-15 * r + 1.42151175831644588870e-7) * r + 1.84631831751005468180e-5) * r
                  + 7.86869131145613259100e-4) * r + 1.48753612908506148525e-2) * r + 1.36929880922735805310e-1) * r
               + 5.99832206555887937690e-1) * r + 1.0  # fmt: skip
    value = top / low
    return -value if q < 0 else value


@kernel
def below(key, index, n):
    """A whole number in [0, n), 1 <= n < 2**63; its bias is below n / 2**32, and from 2**32 on below n / 2**64."""
    x, n_low, n_high = combine(key, u8(index)), u8(n) & LOW_32, u8(n) >> S32
    x_low, x_high = x & LOW_32, x >> S32
    if n_high == u8(0):
        return np.int64((x_high * n_low) >> S32)
    # x * n >> 64, of 128 bits, by the products of halves
    middle = x_high * n_low + ((x_low * n_low) >> S32)
    return np.int64(x_high * n_high + (middle >> S32) + ((x_low * n_high + (middle & LOW_32)) >> S32))


@kernel
def permuted(key, i, n):
    """Where i goes under the permutation of [0, n) that belongs to `key`: no memory, any n >= 1.

    A Feistel network of six rounds over the next even number of bits, walked until it lands below n.
    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains (2002).
    """
    half = u8(1)
    while (u8(1) << (half + half)) < u8(n):
        half += u8(1)
    mask = (u8(1) << half) - u8(1)
    x = u8(i)
    while True:
        left, right = x >> half, x & mask
        for round_number in range(6):
            left, right = right, left ^ (combine(key + u8(round_number), right) & mask)
        x = (left << half) | right
        if x < u8(n):
            return np.int64(x)
