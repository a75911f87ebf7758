"""Where the tensors lie, for any shape; and the first weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
from cllm_spheres.model.geometry import FIELDS, geometry, sequences_at_a_time
from hypothesis import given
from hypothesis import strategies as st

from cllm_spheres.kernels.sizes import ALIGN, BLOCK, attention_floats, product_floats
from cllm_spheres.model.initialise import initial_tables, initialise_block
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.shape import Shape

shapes = st.builds(
    Shape,
    vocab_size=st.integers(2, 3000),
    block_size=st.integers(1, 600),
    layers=st.integers(1, 4),
    heads=st.just(1),
    width=st.integers(1, 70),
    ff_width=st.integers(1, 200),
    bias=st.booleans(),
)


@given(shapes)
def test_tensors_are_aligned_and_do_not_overlap_and_decaying_blocks_hold_matrices_alone(shape):
    layout = Layout(shape)
    end = 0
    for tensor in layout.tensors:
        assert tensor.offset % ALIGN == 0 and end <= tensor.offset < end + BLOCK
        end = tensor.offset + tensor.size
        blocks = range(tensor.offset // BLOCK, (end - 1) // BLOCK + 1)
        assert all((block < layout.decaying_blocks) == (len(tensor.shape) == 2) for block in blocks)
    assert end <= layout.size < end + BLOCK and layout.size == layout.num_blocks * BLOCK


@given(shapes)
def test_parameters_are_as_many_as_gpt2_has(shape):
    c, f, layers = shape.width, shape.ff_width, shape.layers
    matrices = (shape.vocab_size + shape.block_size) * c + layers * (4 * c * c + 2 * c * f)
    gains, biases = (2 * layers + 1) * c, (2 * layers + 1) * c + layers * (5 * c + f)
    layout = Layout(shape)
    assert layout.num_parameters == matrices + gains + (biases if shape.bias else 0)
    assert any(tensor.name.endswith(".bias") for tensor in layout.tensors) == shape.bias


@given(shapes, st.integers(1, 200), st.booleans())
def test_the_parts_of_the_workspace_do_not_overlap(shape, largest_shard, backward):
    card = geometry(Layout(shape), largest_shard=largest_shard, backward=backward)
    values = dict(zip(FIELDS, card.array.tolist(), strict=False))
    n = values["sequences"] * shape.block_size
    assert values["sequences"] == min(largest_shard, sequences_at_a_time(shape.block_size, shape.width)) >= 1
    c, f = shape.width, shape.ff_width
    in_a_layer = dict(
        x=n * c, ln1=n * c, qkv=3 * n * c, lse=n * shape.heads, att=n * c, mid=n * c, ln2=n * c, up=n * f, act=n * f,
        stats=4 * n,
    )  # fmt: skip
    shared = dict(
        x_last=n * c, lnf=n * c, lnf_stats=2 * n, logits=values["head_rows"] * shape.vocab_size,
        scratch=attention_floats(shape.block_size),
        products=product_floats(max(n, c, f, shape.vocab_size)),
    )  # fmt: skip
    gradients = dict(dx=n * c, dt=n * c, datt=n * c, dqkv=3 * n * c, dact=n * f) if backward else {}
    layers_end = shape.layers * values["layer_floats"] if backward else values["x_last"]
    assert values["layer_floats"] > 0 if backward else values["layer_floats"] == 0
    for sizes, begin, end in (
        (in_a_layer, 0, values["layer_floats"] or layers_end),
        (shared | gradients, layers_end, values["arena_floats"]),
    ):
        for name, size in sorted(sizes.items(), key=lambda item: values[item[0]]):
            assert begin <= values[name] and values[name] % ALIGN == 0, name
            begin = values[name] + size
        assert begin <= end
    assert values["arena_floats"] == card.arena_floats


SHAPE = Shape(vocab_size=700, block_size=40, layers=3, heads=3, width=48, ff_width=100)


def initialised(shape, seed=1, order=1):
    layout = Layout(shape)
    params_P = np.full(layout.size, np.nan, np.float32)
    places, values = initial_tables(layout)
    for block in range(layout.num_blocks)[::order]:
        initialise_block.call(
            params_P.ctypes.data, places.ctypes.data, values.ctypes.data, len(places), seed, block
        )  # fmt: skip
    return layout, params_P


def test_the_first_weights_are_gpt2s():
    layout, params_P = initialised(SHAPE)
    for name, view in layout.views(params_P).items():
        if view.ndim == 2:
            deviation = 0.02 / math.sqrt(6) if name.endswith("c_proj.weight") else 0.02
            # of n normals: the mean is off by 1 / sqrt(n), the deviation by 1 / sqrt(2 n); five times that never occurs
            assert abs(view.mean()) < 5 * deviation / math.sqrt(view.size), name
            assert abs(view.std() / deviation - 1) < 5 / math.sqrt(2 * view.size), name
            assert len(np.unique(view)) > 0.99 * view.size, name
        else:
            assert (view == (1 if name.endswith("weight") else 0)).all(), name


def test_the_first_weights_are_a_function_of_seed_and_place():
    _, one = initialised(SHAPE, seed=1)
    _, same = initialised(SHAPE, seed=1, order=-1)
    _, other = initialised(SHAPE, seed=2)
    assert one.tobytes() == same.tobytes() != other.tobytes()
    layers = [Layout(SHAPE).views(one)[f"h.{layer}.mlp.c_fc.weight"] for layer in range(3)]
    assert (layers[0] != layers[1]).any() and (layers[1] != layers[2]).any()


def test_padding_is_zero_and_stays_zero_through_a_gradient(whole):
    layout, params_P = initialised(SHAPE)
    padding_P = np.ones(layout.size, bool)
    for tensor in layout.tensors:
        padding_P[tensor.offset : tensor.offset + tensor.size] = False
    assert padding_P.any() and (params_P[padding_P] == 0).all()
    model = whole(SHAPE)
    _, segment_P = model.shard(*model.batch(3), 1.0)
    assert (segment_P[padding_P] == 0).all() and not np.isnan(segment_P).any()


def test_filling_refuses_tensors_that_do_not_fit():
    layout, params_P = initialised(SHAPE)
    tensors = {name: view.copy() for name, view in layout.views(params_P).items()}
    buffer_P = np.zeros_like(params_P)
    layout.fill(buffer_P, tensors)
    assert buffer_P.tobytes() == params_P.tobytes()
    with pytest.raises(ValueError, match=r"wte\.weight has shape"):
        layout.fill(buffer_P, tensors | {"wte.weight": np.zeros((3, 3), np.float32)})
    with pytest.raises(ValueError, match=r"missing: \['wpe.weight'\]"):
        layout.fill(buffer_P, {name: tensor for name, tensor in tensors.items() if name != "wpe.weight"})
    with pytest.raises(ValueError, match=r"not known: \['lm_head.weight'\]"):
        layout.fill(buffer_P, tensors | {"lm_head.weight": tensors["wte.weight"]})
