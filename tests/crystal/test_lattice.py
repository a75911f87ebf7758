"""The lattice: twelve groups, the golden spiral, and the features made of them."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cllm_spheres.crystal.lattice import cosine_and_sine, features, group, placement
from cllm_spheres.crystal.primes import sieve
from cllm_spheres.errors import InputError

untimed = settings(deadline=None)  # the first example may compile


@given(st.floats(0, 1))
@example(0.125)
@example(math.nextafter(1, 0))
@example(5e-324)
@untimed
def test_cosine_and_sine_are_those_of_a_turn(turns):
    with mpmath.workdps(40):
        expected = mpmath.cospi(2 * mpmath.mpf(turns)), mpmath.sinpi(2 * mpmath.mpf(turns))
        # 1.5 units of the last place of numbers near 1
        assert max(abs(a - b) for a, b in zip(cosine_and_sine(turns), expected, strict=True)) <= 3.4e-16


def test_quarters_of_a_turn_are_exact():
    assert [cosine_and_sine(k / 4) for k in range(5)] == [(1, 0), (0, 1), (-1, 0), (0, -1), (1, 0)]


@given(st.integers(0, 2**31))
@untimed
def test_the_placement_is_the_golden_spiral(i):
    with mpmath.workdps(40):
        angle = 2 * mpmath.pi * i / mpmath.phi**2
        x, y = mpmath.sqrt(i) * mpmath.cos(angle), mpmath.sqrt(i) * mpmath.sin(angle)
    # the golden angle is known to 2**-64 of a turn and is multiplied by i; a radius is rounded to 2**-53 of it
    bound = math.sqrt(i) * (2 * math.pi * i * 2**-64 + 1e-15)
    assert all(abs(a - b) <= bound for a, b in zip(placement(i), (x, y), strict=True))


def test_places_on_the_golden_spiral_crowd_nowhere():
    points = np.array([placement(i) for i in range(1, 1001)])
    distances = np.hypot(*(points[:, None] - points[None]).transpose(2, 0, 1))
    np.fill_diagonal(distances, np.inf)
    nearest = distances.min(1)
    # a hexagonal packing of one point to every pi would have 1.9; measured: 1.60 to 1.77
    assert nearest.min() > 1.5 and nearest.max() < 1.9


@given(st.integers(0, 2**63 - 1))
@untimed
def test_a_group_is_the_rest_by_12(n):
    assert group(n) == n % 12


def twin(count, width):
    """The features in float64, column by column."""
    n = np.arange(1, count + 1)
    angle = 2 * np.pi * n * (3 - math.sqrt(5)) / 2
    columns = [np.sqrt(n) * np.cos(angle), np.sqrt(n) * np.sin(angle)]
    for k in range(1, 7):
        columns += [np.cos(2 * np.pi * (k * n % 12) / 12), np.sin(2 * np.pi * (k * n % 12) / 12)]
    del columns[-1]
    for p in sieve(100)[2:]:
        for k in range(1, (p + 1) // 2):
            columns += [np.cos(2 * np.pi * (k * n % p) / p), np.sin(2 * np.pi * (k * n % p) / p)]
    table = np.array(columns[:width]).T
    table -= table.mean(0)
    size = np.sqrt((table**2).mean(0))
    table = np.where(size > 1e-9, table / np.where(size > 1e-9, size, 1), 0)
    norm = np.sqrt((table**2).sum(1, keepdims=True))
    return np.where(norm > 0, table * math.sqrt(width) / np.where(norm > 0, norm, 1), 1)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 12, 13, 14, 15, 16, 64, 129])
@pytest.mark.parametrize("count", [1, 2, 3, 65, 500])
def test_features_are_those_of_the_formula(count, width):
    found = features(count, width)
    assert found.dtype == np.float32 and found.shape == (count, width)
    # rounded to float32 twice; the columns of long periods are differences of nearly equal numbers
    assert np.abs(found - twin(count, width)).max() <= 1e-5 * math.sqrt(width)


@pytest.mark.parametrize("width", [16, 65, 128, 768])
def test_rows_have_equal_norms_and_columns_a_mean_of_about_0(width):
    found = features(2000, width).astype(np.float64)
    norms = np.sqrt((found**2).sum(1))
    assert np.abs(norms / math.sqrt(width) - 1).max() < 1e-6  # rounded to float32
    assert abs((found**2).mean() - 1) < 1e-6
    # the levelling of the rows moves the means; measured: 0.0195 at most
    assert np.abs(found.mean(0)).max() < 0.04


@pytest.mark.parametrize(("count", "width"), [(381, 64), (1024, 128), (4096, 256), (8192, 384), (20_000, 768)])
def test_the_columns_are_independent(count, width):
    """Of the presets, and of gpt2's width: nothing of the embedding begins as a copy."""
    singular = np.linalg.svd(features(count, width).astype(np.float64), compute_uv=False)
    assert singular[-1] > 0.1 * singular[0], singular[-1] / singular[0]


def test_no_two_tokens_have_the_same_features():
    found = features(5000, 64)
    assert len(np.unique(found, axis=0)) == 5000


@pytest.mark.parametrize(("count", "width"), [(0, 4), (4, 0), (-1, 4), (2**31, 4)])
def test_a_lattice_of_nothing_is_refused(count, width):
    with pytest.raises(InputError, match="lattice"):
        features(count, width)
