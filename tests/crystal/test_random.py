"""Random numbers as a function of (seed, purpose, step, index)."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_spheres.crystal import random
from cllm_spheres.crystal.jit import kernel
from tests.kernels import masks

KEY = np.uint64(0x0123456789ABCDEF)
keys = st.integers(0, 2**64 - 1).map(np.uint64)


@kernel
def uniforms(key, out_N):
    for i in range(out_N.size):
        out_N[i] = random.uniform(key, i)


@kernel
def normals(key, out_N):
    for i in range(out_N.size):
        out_N[i] = random.normal(key, i)


@kernel
def permutation(key, out_N):
    for i in range(out_N.size):
        out_N[i] = random.permuted(key, i, out_N.size)


def permutation_of(key, n):
    out = np.full(n, -1)
    permutation(key, out)
    return out


def key_of(seed, purpose, step):
    return np.uint64(random.key_of(seed, purpose, step))


@settings(deadline=None)  # the first call compiles
@given(keys, st.integers(0, 2**63 - 1))
def test_combine_equals_its_twin_in_whole_numbers(key, value):
    assert random.combine(key, value) == masks.combine(int(key), value)


def test_numbers_of_another_seed_purpose_or_step_are_others():
    coordinates = [(s, p, n) for s in (0, 1, -1, 2**40) for p in range(1, 6) for n in (0, 1, 2, 10**12)]
    assert len({int(key_of(*c)) for c in coordinates}) == len(coordinates)


def test_uniform_is_open_and_has_its_moments():
    out = np.full(1_000_000, np.nan)
    uniforms(KEY, out)
    assert 0 < out.min() < 1e-5 and 1 - 1e-5 < out.max() < 1
    # five standard deviations: of the mean sqrt(1/12 n), of the mean square sqrt(4/45 n)
    assert abs(out.mean() - 1 / 2) < 5 * np.sqrt(1 / 12 / out.size)
    assert abs((out**2).mean() - 1 / 3) < 5 * np.sqrt(4 / 45 / out.size)
    counts = np.bincount((out * 64).astype(int), minlength=64)
    assert ((counts - out.size / 64) ** 2 / (out.size / 64)).sum() < 63 + 5 * np.sqrt(2 * 63)  # chi-squared
    assert abs(np.corrcoef(out[1:], out[:-1])[0, 1]) < 5 / np.sqrt(out.size)


def test_uniform_is_open_at_the_largest_and_the_smallest_hash():
    hash_1 = masks.ALL_64
    # undo mix and combine: the index whose hash is all ones, and all zeros
    for wanted in (hash_1, 0):
        key, index = np.uint64(0), index_with_hash(wanted)
        assert masks.combine(0, index) == wanted == int(random.combine(key, np.uint64(index)))
        assert 0 < random.uniform(key, np.uint64(index)) < 1
        assert np.isfinite(random.normal(key, np.uint64(index)))


def index_with_hash(wanted):
    """The index for which combine(0, index) is `wanted`."""
    return (unmix(unmix(wanted)) - masks.GOLDEN) % 2**64


def unmix(x):
    """The inverse of mix."""
    x = unshift(x, 31) * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
    x = unshift(x, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
    return unshift(x, 30)


def unshift(y, bits):
    """The x of y = x ^ (x >> bits)."""
    x = y
    for _ in range(64 // bits + 1):
        x = y ^ (x >> bits)
    return x


def test_normal_is_the_inverse_of_the_distribution_function():
    uniform, normal = np.full(20_000, np.nan), np.full(20_000, np.nan)
    uniforms(KEY, uniform)
    normals(KEY, normal)
    expected = np.array([NormalDist().inv_cdf(p) for p in uniform])
    # the same published routine: rounding of its polynomials and of the logarithm in the tails only
    assert np.abs(normal - expected).max() < 1e-13


def test_normal_is_right_in_its_far_tails():
    for hash_64 in (
        2**12,
        2**16,
        2**20,
        2**24,
        2**27,
        2**28,
        2**40,
    ):  # uniforms from 3e-16 up; others by symmetry
        for wanted in (hash_64, 2**64 - hash_64):
            index = np.uint64(index_with_hash(wanted))
            expected = NormalDist().inv_cdf(random.uniform(np.uint64(0), index))
            assert abs(random.normal(np.uint64(0), index) - expected) < 1e-13


def test_normal_has_its_moments():
    out = np.full(1_000_000, np.nan)
    normals(KEY, out)
    n = out.size
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((out**power).mean() - moment) < 5 * np.sqrt(variance / n)  # five standard deviations


@settings(deadline=None)
@given(keys, st.one_of(st.integers(1, 300), st.integers(1, 20_000)))
def test_permuted_is_a_bijection(key, n):
    assert (np.sort(permutation_of(key, n)) == np.arange(n)).all()


def test_permuted_is_a_bijection_around_every_power_of_two():
    for n in [1, 2, 3, *(2**k + d for k in range(2, 15) for d in (-1, 0, 1))]:
        assert (np.sort(permutation_of(KEY, n)) == np.arange(n)).all()


def test_permuted_stays_below_n_where_n_is_large():
    for n in (2**31 + 1, 2**40 - 1):
        assert all(0 <= random.permuted(KEY, i, n) < n for i in (0, 1, n // 2, n - 1))


def test_permutations_of_neighbouring_steps_are_others_and_look_random():
    n = 5000
    all_of_them = np.array([permutation_of(key_of(1, random.PURPOSE_ORDER, epoch), n) for epoch in range(20)])
    for i in range(20):
        # two random permutations agree in about one place (Poisson), and so does one with the identity
        assert (all_of_them[:i] == all_of_them[i]).sum(1).max(initial=0) < 12
        assert (all_of_them[i] == np.arange(n)).sum() < 12
        assert abs(np.corrcoef(all_of_them[i], np.arange(n))[0, 1]) < 5 / np.sqrt(n)


def test_small_permutations_occur_about_equally_often():
    orders = [tuple(permutation_of(key_of(s, random.PURPOSE_ORDER, 0), 4)) for s in range(4800)]
    counts = np.array([orders.count(order) for order in set(orders)])
    # all 24, each 200 times within five standard deviations
    assert len(counts) == 24 and np.abs(counts - 200).max() < 5 * np.sqrt(200)


@settings(deadline=None)  # the first call compiles
@given(keys, st.integers(0, 2**63 - 1), st.one_of(st.integers(1, 2**32 + 9), st.integers(2**32, 2**63 - 1)))
def test_below_is_the_upper_part_of_a_product(key, index, n):
    """Of the upper 32 bits for small n, as every run so far has it; of all 64 for corpora of any size."""
    x = int(random.combine(key, np.uint64(index)))
    assert random.below(key, index, n) == (((x >> 32) * n) >> 32 if n < 2**32 else (x * n) >> 64) < n


def test_below_reaches_every_number_equally_often():
    counts = np.bincount([random.below(KEY, i, 7) for i in range(70_000)], minlength=7)
    assert counts.size == 7 and np.abs(counts - 10_000).max() < 5 * np.sqrt(10_000)
