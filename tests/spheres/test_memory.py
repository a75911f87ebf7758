"""The shared file: regions that do not overlap, and views that reach what the addresses reach."""

from __future__ import annotations

import os
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_spheres.faults import MOST_FAULTS
from cllm_spheres.kernels.sizes import BLOCK, SLOT_FLOATS
from cllm_spheres.spheres import atomics
from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres.memory import ERROR_BYTES, LINE, PAGE, Regions, SharedMemory, Sizes

sizes = st.builds(
    Sizes,
    num_parameters=st.integers(1, 400).map(lambda blocks: blocks * BLOCK),
    num_spheres=st.integers(1, 156),
    num_windows=st.integers(0, 300),
    has_squares=st.booleans(),
    packed_bytes=st.integers(0, 10 * PAGE),
    trains=st.booleans(),
)


def extents(regions):
    """name -> (start, end) of every region, by what its users write there."""
    s = regions.sizes
    flat, windows = 4 * s.num_parameters, 8 * s.num_windows
    counts = dict(
        control=M.CONTROL_LINES * LINE, decision=8 * 8, workers=8 * s.num_spheres * M.WORKER_WORDS,
        spheres=8 * s.num_spheres * M.SPHERE_WORDS, ring=8 * M.RING * M.RECORD_WORDS, rates=8 * M.RING,
        window_starts=windows, window_lengths=windows, window_firsts=windows, window_losses=windows,
        window_hits=windows, norms=8 * s.num_parameters // BLOCK,
        updated=8 * s.num_parameters // BLOCK, faults=8 * MOST_FAULTS * M.FAULT_WORDS,
        errors=s.num_spheres * ERROR_BYTES, slots=4 * s.num_spheres * SLOT_FLOATS, params=flat,
        moments=flat if s.trains else 0, squares=flat if s.has_squares else 0,
        gradient=flat if s.trains and s.num_spheres > 2 else 0, packed=s.packed_bytes,
        segments=flat * s.num_spheres if s.trains else 0,
    )  # fmt: skip
    return {name: (getattr(regions, name), getattr(regions, name) + count) for name, count in counts.items()}


@given(sizes)
def test_regions_do_not_overlap_and_lie_inside_the_file(sizes):
    regions = Regions(sizes)
    places = sorted(extents(regions).values())
    assert places[0][0] == 0
    assert all(end <= start for (_, end), (start, _) in pairwise(places))
    assert places[-1][1] <= regions.total
    assert regions.total % PAGE == 0 and regions.stride == 4 * sizes.num_parameters


@given(sizes)
def test_every_region_begins_at_a_cache_line_and_the_big_ones_at_a_page(sizes):
    regions = Regions(sizes)
    assert all(start % LINE == 0 for start, _ in extents(regions).values())
    for name in ("slots", "params", "moments", "squares", "gradient", "packed", "segments"):
        assert getattr(regions, name) % PAGE == 0, name
    # whole pages belong to one sphere or one span alone, so that their owner can take them
    assert regions.stride % PAGE == 0 and 4 * BLOCK % PAGE == 0
    # the words of two workers, and of two spheres, never share a line
    assert (8 * M.WORKER_WORDS) % LINE == 0 and (8 * M.SPHERE_WORDS) % LINE == 0


SMALL = Sizes(num_parameters=2 * BLOCK, num_spheres=3, num_windows=4, has_squares=True)


def test_a_second_mapping_of_the_descriptor_sees_the_same_memory():
    one = SharedMemory(SMALL)
    other = SharedMemory(SMALL, os.dup(one.descriptor))
    for i, view in enumerate((one.params, one.moments, one.squares, one.segment(0), one.segment(2))):
        view[:] = i + 1
    assert [other.params[-1], other.moments[0], other.squares[5], other.segment(2)[-1]] == [1, 2, 3, 5]
    assert (other.segment(1) == 0).all()
    atomics.store_word(one.control(M.DONE), 77)
    assert other.words(other.regions.control + M.DONE * LINE, 1)[0] == 77
    one.worker_words()[1, M.W_STATE] = 5
    one.sphere_words()[2, M.P_TOKENS] = 6
    one.ring_doubles()[3, M.R_LOSS] = 1.5
    assert other.worker_words()[1, M.W_STATE] == 5 and other.sphere_words()[2, M.P_TOKENS] == 6
    assert other.ring_words()[3].view(np.float64)[M.R_LOSS] == 1.5


def test_without_second_moments_no_memory_is_kept_for_them():
    sgd = Sizes(**SMALL.to_dict() | {"has_squares": False})
    assert Regions(SMALL).total - Regions(sgd).total == 4 * SMALL.num_parameters
    assert SharedMemory(sgd).squares.size == 0


def test_for_an_evaluation_only_the_weights_are_kept():
    scored = Sizes(**SMALL.to_dict() | {"has_squares": False, "trains": False})
    # moments, squares, the sum of the segments of three spheres, and these
    assert Regions(SMALL).total - Regions(scored).total == 4 * SMALL.num_parameters * 6
    assert SharedMemory(scored).moments.size == 0


def test_the_file_never_appears_in_a_folder():
    before = set(os.listdir("/dev/shm"))
    memory = SharedMemory(SMALL)
    assert set(os.listdir("/dev/shm")) == before
    assert os.readlink(f"/proc/self/fd/{memory.descriptor}").startswith("/memfd:")
    assert not os.get_inheritable(memory.descriptor)


def test_pages_are_taken_when_they_are_allocated():
    memory = SharedMemory(SMALL)
    assert os.fstat(memory.descriptor).st_blocks == 0
    memory.allocate(memory.regions.params, memory.regions.stride)
    memory.allocate(memory.regions.params, 0)
    assert os.fstat(memory.descriptor).st_blocks * 512 == memory.regions.stride
    with pytest.raises(OSError):
        memory.allocate(-PAGE, PAGE)


def test_what_a_worker_said_is_read_back_and_cut_to_its_end():
    memory = SharedMemory(SMALL)
    memory.set_error(0, "Zu wenig Speicher übrig")
    memory.set_error(1, "x" * 5000 + "the end")
    assert memory.error(0) == "Zu wenig Speicher übrig"
    assert len(memory.error(1)) == ERROR_BYTES and memory.error(1).endswith("xthe end")
