"""Primes, factors and common divisors, against sympy and the standard library."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sympy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cllm_spheres.crystal import primes
from cllm_spheres.crystal.gcd_lanes import GROUP
from cllm_spheres.crystal.primes import LARGEST, factorise, gcd, gcd_matrix, is_prime, sieve
from cllm_spheres.errors import InputError

untimed = settings(deadline=None)  # the first example may compile
# of every size in bits alike, and those around powers of two, where the lanes get wider
sized = st.integers(0, 63).flatmap(lambda bits: st.integers(2**bits // 2, 2**bits - 1))


@given(st.integers(-5, 20_000))
@example(0)
@example(1)
@example(2)
@example(3)
@example(8)
@example(9)
@untimed
def test_the_sieve_is_sympys(limit):
    found = sieve(limit)
    assert found.dtype == np.int64 and found.tolist() == list(sympy.primerange(2, limit + 1))


@pytest.mark.parametrize("limit", [primes._SEGMENT * 2 + k for k in range(-1, 6)])
def test_the_sieve_has_no_seam(limit):
    assert sieve(limit).tolist() == list(sympy.primerange(2, limit + 1))


def test_the_sieve_counts_as_many_primes_as_there_are():
    assert [len(sieve(10**k)) for k in range(1, 8)] == [4, 25, 168, 1229, 9592, 78498, 664579]
    with pytest.raises(InputError, match="4,294,967,296"):
        sieve(2**32 + 1)


@given(sized)
@untimed
def test_is_prime_is_sympys(n):
    assert is_prime(n) == sympy.isprime(n)


@pytest.mark.parametrize("n", [2**63 - 25, 2**63 - 165, 2**61 - 1, 2**31 - 1, 3037000493])
def test_large_primes_are_their_own_factors(n):
    assert is_prime(n) and factorise(n) == [(n, 1)]


def test_numbers_that_deceive_a_simple_test_are_composite():
    # Carmichael numbers, and the least strong pseudoprimes to the first 2, 4, 8 and 9 prime bases
    for n in (561, 41041, 825265, 1373653, 3215031751, 341550071728321, 3825123056546413051):
        assert not is_prime(n)


@given(sized.filter(bool))
@example(1)
@example(LARGEST)
@example(3037000493**2)
@example(2147483647 * 4294967291)
@example(2**62)
@example(3**39)
@example(1000003**3)
@untimed
def test_factors_are_sympys(n):
    assert factorise(n) == sorted(sympy.factorint(n).items())


@given(st.lists(st.integers(2, 2**21 - 1), min_size=2, max_size=3))
@untimed
def test_products_fall_apart_into_their_factors(numbers):
    assert factorise(math.prod(numbers)) == sorted(sympy.factorint(math.prod(numbers)).items())


@pytest.mark.parametrize("n", [0, -6, 2**63])
def test_what_cannot_be_factorised_is_refused(n):
    with pytest.raises(InputError, match="1 to 2"):
        factorise(n)


@given(sized, sized)
@example(0, 0)
@example(0, LARGEST)
@example(LARGEST, LARGEST)
@example(2**62, 3 * 2**61)
@untimed
def test_gcd_is_that_of_the_standard_library(a, b):
    assert gcd(a, b) == math.gcd(a, b) == gcd(b, a)


@given(sized, sized, st.integers(0, 2**20))
@untimed
def test_gcd_finds_a_common_factor(a, b, factor):
    a, b = a * factor, b * factor
    if max(a, b) <= LARGEST:
        assert gcd(a, b) == math.gcd(a, b)


edges = [0, 1, 2, 2**15, 2**16 - 1, 2**16, 2**31, 2**32 - 1, 2**32, 2**62, LARGEST]


@pytest.mark.parametrize("bits", [1, 8, 15, 16, 17, 31, 32, 33, 48, 63])  # of all widths of a lane
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (7, 31), (2, GROUP - 1), (2, GROUP), (5, 2 * GROUP + 77)])
def test_a_matrix_of_gcds_is_numpys(rng, bits, shape):
    a, b = (rng.integers(0, 2**bits, size, dtype=np.int64) for size in shape)
    a[0], b[-1] = a[-1], a[0]  # equal numbers
    a[rng.integers(0, a.size)] = 0
    b[rng.integers(0, b.size)] = 0
    found = gcd_matrix(a, b)
    assert found.dtype == np.int64 and (found == np.gcd.outer(a, b)).all()


@given(st.lists(sized, max_size=9), st.lists(sized, max_size=9), st.integers(1, 2**16))
@example(edges, edges, 1)
@untimed
def test_a_matrix_of_gcds_is_that_of_each_pair(a, b, factor):
    a, b = ([n * factor if n * factor <= LARGEST else n for n in numbers] for numbers in (a, b))
    found = gcd_matrix(a, b)
    assert found.shape == (len(a), len(b))
    assert found.tolist() == [[math.gcd(x, y) for y in b] for x in a]


@pytest.mark.parametrize("wrong", [[-1], [0.5], [[1]], np.array([2**63], np.uint64), [2**64]])
def test_numbers_that_have_no_gcd_here_are_refused(wrong):
    with pytest.raises(InputError, match="gcd_matrix takes"):
        gcd_matrix([4], wrong)
