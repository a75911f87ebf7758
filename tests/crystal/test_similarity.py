"""The crystal's similarity: its formula, its rows, and the neighbours of every number."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_spheres.crystal.similarity import _BLOCK, _FEW, _ROWS, nearest, row, similarity
from cllm_spheres.crystal.ulam import LARGEST, place
from cllm_spheres.errors import InputError

untimed = settings(deadline=None)  # the first example may compile
number = st.integers(1, 63).flatmap(lambda bits: st.integers(2**bits // 2, 2**bits - 1))
weight = st.sampled_from([0.0, 0.3, 0.7, 1.0, 1 / 3, 12.5])


def twin(a, b, gcd_weight, ulam_weight):
    """The formula in Python's own numbers: the squared distance is exact, and so is its rounding."""
    (ax, ay), (bx, by) = place(a), place(b)
    squared = (ax - bx) ** 2 + (ay - by) ** 2
    return gcd_weight * float(math.gcd(a, b)) / float(max(a, b)) + ulam_weight / (1.0 + math.sqrt(float(squared)))


@given(number, number, weight, weight)
@untimed
def test_similarity_has_the_bits_of_its_formula(a, b, gcd_weight, ulam_weight):
    expected = twin(a, b, gcd_weight, ulam_weight)
    assert similarity(a, b, gcd_weight, ulam_weight) == expected == similarity(b, a, gcd_weight, ulam_weight)


def test_the_squared_distance_of_opposite_corners_fits_64_bits():
    inner = 3037000497**2 + 3 * 3037000498  # the last number but a side of the last whole ring: its lower left corner
    assert place(inner) == (-1518500249, -1518500249)
    outer = 3037000499**2 + 3037000500  # the upper right corner of the ring that breaks off
    assert place(outer) == (1518500250, 1518500250) and outer < LARGEST
    assert similarity(inner, outer, 0.0, 1.0) == twin(inner, outer, 0.0, 1.0)


@given(st.integers(1, 2000), st.integers(1, 700), weight, weight)
@settings(deadline=None, max_examples=40)
def test_a_row_has_the_bits_of_each_pair(a, count, gcd_weight, ulam_weight):
    expected = [similarity(a, b, gcd_weight, ulam_weight) for b in range(1, count + 1)]
    assert row(a, count, gcd_weight, ulam_weight).tolist() == expected


@pytest.mark.parametrize("a", [LARGEST, 2**62, 3037000493**2, 720720])
def test_a_row_of_a_large_number(a):
    assert row(a, 100, 0.7, 0.3).tolist() == [similarity(a, b, 0.7, 0.3) for b in range(1, 101)]


def by_sorting(count, gcd_weight, ulam_weight):
    """All others of every number: numbers and similarities [count, count - 1]."""
    table = np.array([row(a, count, gcd_weight, ulam_weight) for a in range(1, count + 1)])
    np.fill_diagonal(table, -np.inf)
    order = np.argsort(-table, axis=1, kind="stable")[:, :-1]
    return order + 1, np.take_along_axis(table, order, 1)


@pytest.mark.parametrize(
    ("count", "neighbours"),
    [
        (2, 1),
        (3, 2),
        (60, 16),
        (_ROWS + 1, 5),
        (_FEW + 9, _FEW),
        (_FEW + 9, _FEW + 1),
        (_FEW + 9, _FEW + 8),
        (_BLOCK, 16),
        (2 * _BLOCK + 7, 16),
    ],
)
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.25, 8.0)])
def test_the_nearest_are_those_that_sorting_finds(count, neighbours, weights):
    numbers_NK, similarities_NK = nearest(count, neighbours, *weights)
    assert numbers_NK.dtype == np.int32 and similarities_NK.dtype == np.float64
    expected, similarities = by_sorting(count, *weights)
    assert (numbers_NK == expected[:, :neighbours]).all()
    assert (similarities_NK == similarities[:, :neighbours]).all()


def test_progress_ends_with_all_rows():
    seen = []
    nearest(_ROWS * 2 + 1, 3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(_ROWS, 2 * _ROWS + 1), (2 * _ROWS, 2 * _ROWS + 1), (2 * _ROWS + 1, 2 * _ROWS + 1)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1, 1), "vocabulary of 1"),
        ((10, 10), "10 neighbours of 10 tokens.*1 to 9"),
        ((10, 0), "1 to 9"),
        ((0, 1), "0 numbers"),
        ((2**31, 1), "2,147,483,648 numbers"),
        ((10, 2, -0.1), "gcd weight is -0.1"),
        ((10, 2, 0.7, math.nan), "ulam weight is nan"),
        ((10, 2, 0.7, math.inf), "ulam weight is inf"),
    ],
)
def test_what_has_no_neighbours_is_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        nearest(*arguments)


def test_a_row_of_nothing_is_refused():
    for arguments in ((0, 5), (5, 0), (2**63, 5), (5, 5, math.nan)):
        with pytest.raises(InputError):
            row(*arguments)
