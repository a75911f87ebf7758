"""The rows that tell of a program: nothing is left out of them, nothing counted twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_spheres.model import dtypes
from cllm_spheres.model.costs import flops_per_token
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.program import RECOMPUTE, program
from cllm_spheres.model.shape import Shape
from cllm_spheres.model.summary import parts

shapes = st.builds(
    lambda heads, head_width, **sizes: Shape(heads=heads, width=heads * head_width, **sizes),
    heads=st.integers(1, 3), head_width=st.integers(1, 20), vocab_size=st.integers(1, 400),
    block_size=st.integers(1, 70), layers=st.integers(1, 4), ff_width=st.integers(1, 90), bias=st.booleans(),
)  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(shapes, st.sampled_from(RECOMPUTE), st.sampled_from(dtypes.DTYPES))
def test_every_call_parameter_and_operation_is_counted_once(shape, mode, dtype):
    layout = Layout(shape)
    made = program(layout, dtype, largest_shard=3, dropout=0.1, recompute=mode)
    rows = [(row, len(part.blocks)) for part in parts(made) for row in part.rows]
    assert sum(times for _, times in rows) == len(made.calls)
    assert sum(row.parameters * times for row, times in rows) == layout.num_parameters
    flops = sum(row.flops * times for row, times in rows)
    assert flops == flops_per_token(shape) if mode != "block" else flops >= flops_per_token(shape)
    sizes = sum(row.size_bytes * times for row, times in rows)
    assert sizes == sum(value.size_bytes for value in made.places if value.name != "scratch")


@pytest.mark.parametrize("mode", RECOMPUTE)
def test_equal_blocks_are_one_part_in_either_direction(mode):
    layout = Layout(Shape(vocab_size=50, block_size=16, layers=5, heads=2, width=32, ff_width=64))
    found = parts(program(layout, "fp32", largest_shard=4, recompute=mode))
    blocks = [(part.forward, part.blocks) for part in found if part.blocks[0] is not None]
    assert blocks == [(True, (0, 1, 2, 3, 4)), (False, (4, 3, 2, 1, 0))]
    assert [part.rows[0].call.op for part in found if part.blocks[0] is None] == [
        "embed_forward", "norm_forward", "norm_backward", "embed_backward",
    ]  # fmt: skip


def test_a_block_without_gradients_of_its_weights_is_a_part_of_its_own():
    shape = Shape(vocab_size=50, block_size=16, layers=3, heads=2, width=32, ff_width=64)
    frozen = frozenset(placed.name for placed in Layout(shape).tensors if placed.name.startswith("h.1."))
    found = parts(program(Layout(shape, frozen), "fp32", largest_shard=4))
    backward = [part for part in found if not part.forward and part.blocks[0] is not None]
    assert [part.blocks for part in backward] == [(2,), (1,), (0,)]
    flops = [sum(row.flops for row in part.rows) for part in backward]
    products, attention = 2 * (3 * 32 * 32 + 32 * 32 + 2 * 32 * 64), 2 * 16 * 32
    assert flops == [2 * products + 2 * attention, products + 2 * attention, 2 * products + 2 * attention]
