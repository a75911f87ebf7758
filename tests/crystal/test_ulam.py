"""Ulam's spiral: walked step by step, and undone by its inverse."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cllm_spheres.crystal.ulam import LARGEST, LAST_RING, isqrt, number, numbers, place, places
from cllm_spheres.errors import InputError

untimed = settings(deadline=None)  # the first example may compile
large = st.integers(1, LARGEST)


def walk(count):
    """The first places, step by step: straight on until the way to the left is free."""
    x = y = 0
    dx, dy = 0, -1
    seen = set()
    for _ in range(count):
        yield x, y
        seen.add((x, y))
        if (x - dy, y + dx) not in seen:
            dx, dy = -dy, dx
        x, y = x + dx, y + dy


def test_the_spiral_is_that_of_a_walk_that_turns_left_where_it_can():
    count = 5000
    expected = np.array(list(walk(count)))
    assert (places(np.arange(1, count + 1)) == expected).all()
    assert (numbers(expected) == np.arange(1, count + 1)).all()


def test_the_picture_of_the_docstring():
    import cllm_spheres.crystal.ulam as ulam

    picture = [line.split() for line in ulam.__doc__.splitlines() if line.startswith("    ")]
    assert len(picture) == 5
    for row, cells in enumerate(picture):
        for column, cell in enumerate(cells):
            assert place(int(cell)) == (column - 2, 2 - row)


@given(large)
@example(LARGEST)
@example(LARGEST - 1)
@example(3037000499**2)
@example(3037000499**2 + 1)
@untimed
def test_the_number_of_a_place_is_the_number_it_came_from(n):
    x, y = place(n)
    assert number(x, y) == n
    ring = (math.isqrt(n - 1) + 1) // 2
    assert max(abs(x), abs(y)) == ring


@given(large.filter(lambda n: n < LARGEST))
@untimed
def test_numbers_that_follow_each_other_are_neighbours(n):
    (ax, ay), (bx, by) = place(n), place(n + 1)
    assert abs(ax - bx) + abs(ay - by) == 1


@given(st.integers(-(LAST_RING - 1), LAST_RING - 1), st.integers(-(LAST_RING - 1), LAST_RING - 1))
@untimed
def test_the_place_of_a_number_is_the_place_it_came_from(x, y):
    assert place(number(x, y)) == (x, y)
    assert (places(numbers([[x, y]])) == [[x, y]]).all()


@given(st.integers(0, LARGEST), st.integers(0, 3037000499), st.integers(-2, 2))
@untimed
def test_isqrt_is_exact(n, root, around):
    assert isqrt(n) == math.isqrt(n)
    n = min(max(root * root + around, 0), LARGEST)
    assert isqrt(n) == math.isqrt(n)


@pytest.mark.parametrize("wrong", [[0], [3, -1], [2**63], np.array([2**63], np.uint64), [1.5], [[1, 2]], [2**70]])
def test_numbers_that_are_not_on_the_spiral_are_refused(wrong):
    with pytest.raises(InputError):
        places(wrong)


def test_places_beyond_64_bits_are_refused():
    x, y = place(LARGEST)
    assert numbers([[x, y], [0, 0]]).tolist() == [LARGEST, 1]
    for outside in ((x - 1, y), (LAST_RING + 1, 0), (0, -(2**63)), (-LAST_RING, 0)):
        with pytest.raises(InputError, match=rf"\({outside[0]}, {outside[1]}\)"):
            numbers([[5, 5], outside])
    with pytest.raises(InputError, match="shape"):
        numbers([1, 2])


def test_no_numbers_have_no_places():
    assert places([]).shape == (0, 2) and numbers(np.zeros((0, 2), int)).shape == (0,)
