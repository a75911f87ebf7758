"""Who stands where: properties for every number of spheres."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_spheres.spheres.topology import KISSING, MAX_SPHERES, children, group, hosted, level, parent, siblings, span

EVERY_NUMBER = range(1, MAX_SPHERES + 1)


def test_there_are_157_places_with_node_zeros_own():
    assert 1 + MAX_SPHERES == 157


def test_63_spheres_are_12_and_51_nine_parents_with_four_children_and_three_with_five():
    assert [level(sphere) for sphere in range(63)].count(1) == 12
    assert sorted(len(children(sphere, 63)) for sphere in range(12)) == [4] * 9 + [5] * 3
    assert sum(len(children(sphere, 63)) for sphere in range(12)) == 51


@pytest.mark.parametrize("num_spheres", EVERY_NUMBER)
def test_every_sphere_but_those_of_level_1_is_the_child_of_its_parent_alone(num_spheres):
    families = [children(sphere, num_spheres) for sphere in range(num_spheres)]
    assert sorted(child for family in families for child in family) == list(range(KISSING, num_spheres))
    for sphere in range(num_spheres):
        above = parent(sphere, num_spheres)
        assert (above is None) == (sphere < KISSING)
        if above is not None:
            assert above < KISSING and sphere in families[above]
        assert group(sphere, num_spheres) == (sphere if above is None else above) < KISSING


@pytest.mark.parametrize("num_spheres", EVERY_NUMBER)
def test_level_2_is_spread_evenly_and_nobody_kisses_more_than_twelve(num_spheres):
    sizes = [len(children(sphere, num_spheres)) for sphere in range(min(KISSING, num_spheres))]
    assert max(sizes) - min(sizes) <= 1
    for sphere in range(num_spheres):
        others = siblings(sphere, num_spheres)
        assert sphere not in others and len(others) <= KISSING - 1
        assert all(sphere in siblings(other, num_spheres) for other in others)
        # its parent (Node Zero for level 1) and its children
        assert 1 + len(children(sphere, num_spheres)) <= 1 + KISSING


@given(st.data())
def test_the_spheres_are_dealt_to_the_workers_once_each_and_evenly(data):
    num_spheres = data.draw(st.integers(1, MAX_SPHERES))
    num_workers = data.draw(st.integers(1, num_spheres))
    dealt = [hosted(worker, num_workers, num_spheres) for worker in range(num_workers)]
    assert sorted(sphere for spheres in dealt for sphere in spheres) == list(range(num_spheres))
    counts = [len(spheres) for spheres in dealt]
    assert min(counts) >= 1 and max(counts) - min(counts) <= 1


@given(num_workers=st.integers(1, MAX_SPHERES), num_blocks=st.integers(1, 100_000))
def test_spans_cover_all_blocks_without_overlap_and_evenly(num_workers, num_blocks):
    spans = [span(worker, num_workers, num_blocks) for worker in range(num_workers)]
    assert spans[0][0] == 0 and spans[-1][1] == num_blocks
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    sizes = [last - first for first, last in spans]
    assert min(sizes) >= 0 and max(sizes) - min(sizes) <= 1
