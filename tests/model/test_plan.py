"""Places in the arena: what lives at the same time never overlaps, for any lifetimes and for real programs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_spheres.model import dtypes
from cllm_spheres.model.description import Linear, Norm
from cllm_spheres.model.families import described, tensors_of
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.plan import LINE, lifetimes, place
from cllm_spheres.model.program import RECOMPUTE, program
from cllm_spheres.model.shape import Shape

lives = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(1, 500)).map(lambda t: (*sorted(t[:2]), t[2])),
    max_size=25,
)  # (first call, last call, bytes)


def assert_apart(lives, sizes, places, size):
    """Whatever lives at the same time lies apart, at cache lines, in an arena of `size` bytes."""
    assert lives.keys() == places.keys()
    for value, at in places.items():
        assert at % LINE == 0 and 0 <= at <= size - sizes[value]
    for one, other in itertools.combinations(lives, 2):
        if lives[one][0] <= lives[other][1] and lives[other][0] <= lives[one][1]:
            assert places[one] + sizes[one] <= places[other] or places[other] + sizes[other] <= places[one]


@given(lives)
def test_values_that_live_at_the_same_time_lie_apart(values):
    spans = {number: value[:2] for number, value in enumerate(values)}
    sizes = {number: value[2] for number, value in enumerate(values)}
    places, size = place(spans, sizes)
    assert_apart(spans, sizes, places, size)
    rounded = [-(-value[2] // LINE) * LINE for value in values]
    needed = max(sum(r for r, v in zip(rounded, values, strict=True) if v[0] <= t <= v[1]) for t in range(13))
    assert needed <= size <= sum(rounded)


def test_a_value_that_has_ended_leaves_its_place():
    assert place({"a": (0, 1), "b": (2, 3)}, {"a": 64, "b": 64}) == ({"a": 0, "b": 0}, 64)
    assert place({"a": (0, 2), "b": (2, 3)}, {"a": 64, "b": 64})[1] == 128
    assert place({}, {}) == ({}, 0)


@given(st.lists(st.lists(st.integers(0, 6), max_size=4), max_size=15))
def test_a_lifetime_goes_from_the_first_call_to_the_last(used):
    calls = {value: [n for n, values in enumerate(used) if value in values] for values in used for value in values}
    assert lifetimes(used) == {value: (found[0], found[-1]) for value, found in calls.items()}


shapes = st.builds(
    lambda heads, head_width, **sizes: Shape(heads=heads, width=heads * head_width, **sizes),
    heads=st.integers(1, 3), head_width=st.integers(1, 20), vocab_size=st.integers(1, 400),
    block_size=st.integers(1, 70), layers=st.integers(1, 3), ff_width=st.integers(1, 90), bias=st.booleans(),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(shapes, st.integers(1, 40), st.sampled_from([0.0, 0.1]), st.sampled_from(dtypes.DTYPES))
def test_the_values_of_a_program_lie_apart_in_every_mode(shape, largest_shard, dropout, dtype):
    layout = Layout(shape)
    wanted = [("train", mode) for mode in RECOMPUTE] + [("evaluate", "none")]
    wanted += [("logits", "none")] if dtype == "fp32" else []
    for purpose, mode in wanted:
        options = dict(largest_shard=largest_shard, dropout=dropout)
        found = program(layout, dtype, recompute=mode, purpose=purpose, **options)
        assert 1 <= found.sequences <= largest_shard
        used = [call.values for call in found.calls]
        scratch = [value for value in found.places if value.name == "scratch"]
        used[0], used[-1] = used[0] + scratch, used[-1] + scratch  # what all calls share lives as long as all
        lengths = {value: value.size_bytes for value in found.places}
        assert_apart(lifetimes(used), lengths, found.places, found.arena_bytes)


@pytest.mark.parametrize("dtype", dtypes.DTYPES)
def test_what_the_gradients_of_matrices_alone_read_is_not_kept_for_frozen_ones(dtype):
    shape = Shape(vocab_size=300, block_size=64, layers=8, heads=4, width=128, ff_width=512)
    matrices = frozenset(tensor.name for tensor in tensors_of(shape) if len(tensor.shape) == 2)
    full, some = (program(Layout(shape, frozen), dtype, largest_shard=8) for frozen in (frozenset(), matrices))
    steps = [step for step in described(shape).steps if step.block is not None]
    kept = [step.out for step in steps if isinstance(step, Norm) or (isinstance(step, Linear) and step.activation)]
    read = {value for call in full.calls if not call.forward for value in call.values}
    assert len(kept) == 3 * shape.layers and {full.streams[stream] for stream in kept} <= read
    assert not any(some.streams[s] in call.values for call in some.calls if not call.forward for s in kept)
    assert some.arena_bytes < full.arena_bytes


@pytest.mark.parametrize("dtype", dtypes.DTYPES)
def test_computing_again_takes_less_memory_and_the_same_sequences(dtype):
    layout = Layout(Shape(vocab_size=300, block_size=64, layers=8, heads=4, width=128, ff_width=512))
    found = [program(layout, dtype, largest_shard=8, recompute=mode) for mode in RECOMPUTE]
    assert len({one.sequences for one in found}) == 1
    assert found[0].arena_bytes > found[1].arena_bytes > found[2].arena_bytes
    counts = [len(one.calls) for one in found]
    assert counts[0] < counts[1] < counts[2]
    advanced = [[call.advance for call in one.calls if call.advance] for one in found]
    assert advanced[0] == advanced[1] == advanced[2] and np.count_nonzero(advanced[0]) == 16
