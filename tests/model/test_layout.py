"""Where the tensors lie, for any shape; and the first weights."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_spheres.crystal.lattice import features
from cllm_spheres.kernels.sizes import ALIGN, BLOCK
from cllm_spheres.model.initialise import initial_tables, initialise_block, lattice_embedding
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


def test_the_lattice_gives_the_token_embedding_the_deviation_of_random_ones():
    order_R = np.random.default_rng(1).permutation(SHAPE.vocab_size)
    name, embedding_VC = lattice_embedding(order_R, SHAPE)
    expected = features(SHAPE.vocab_size, SHAPE.width) * np.float32(0.02)
    assert name == "wte.weight" and embedding_VC.dtype == np.float32
    assert (embedding_VC[order_R] == expected).all()


@given(shapes, st.data())
def test_frozen_tensors_lie_in_a_buffer_of_their_own(shape, data):
    names = [tensor.name for tensor in Layout(shape).tensors]
    frozen = data.draw(st.frozensets(st.sampled_from(names)))
    layout = Layout(shape, frozen)
    assert {tensor.name for tensor in layout.frozen_tensors} == frozen
    assert {tensor.name for tensor in layout.tensors} == set(names) - frozen
    assert layout.num_parameters == Layout(shape).num_parameters
    for places, size in ((layout.tensors, layout.size), (layout.frozen_tensors, layout.frozen_size)):
        ends = sorted((tensor.offset, tensor.offset + tensor.size) for tensor in places)
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(ends))
        assert not ends or ends[-1][1] <= size
    with pytest.raises(ValueError, match=r"no tensors \['h.x'\] to freeze"):
        Layout(shape, frozen | {"h.x"})


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
