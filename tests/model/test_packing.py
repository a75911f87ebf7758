"""The packed weights of bfloat16: both forms of every matrix, heads padded, against the slow twins of the forms."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_spheres.model import dtypes
from cllm_spheres.model.shape import Shape
from tests.kernels.bf16.twins import UNWRITTEN, form_of, padded
from tests.model.conftest import DTYPES

pytestmark = list(DTYPES[1].marks)

SHAPES = {
    "round": Shape(vocab_size=64, block_size=16, layers=2, heads=2, width=64, ff_width=128),
    "odd": Shape(vocab_size=37, block_size=11, layers=2, heads=3, width=15, ff_width=29),
    "wide": Shape(vocab_size=70, block_size=8, layers=1, heads=5, width=180, ff_width=1100, bias=False),  # heads of 36
    "least": Shape(vocab_size=2, block_size=1, layers=1, heads=1, width=1, ff_width=1),
}
MARGIN = 512


def spread(matrix, row_group, column_group):
    """Every group of rows and of columns padded with zeros to a multiple of 32."""
    rows, columns = matrix.shape[0] // row_group, matrix.shape[1] // column_group
    out = np.zeros((rows, padded(row_group), columns, padded(column_group)), np.float32)
    out[:, :row_group, :, :column_group] = matrix.reshape(rows, row_group, columns, column_group)
    return out.reshape(rows * padded(row_group), -1)


def groups_of_all(shape):
    """The sizes of the groups that each matrix's rows and columns come in."""
    d, c, f = shape.width // shape.heads, shape.width, shape.ff_width
    groups = {"wte.weight": (shape.vocab_size, c)}
    for layer in range(shape.layers):
        groups[f"h.{layer}.attn.c_attn.weight"] = c, d
        groups[f"h.{layer}.attn.c_proj.weight"] = d, c
        groups[f"h.{layer}.mlp.c_fc.weight"] = c, f
        groups[f"h.{layer}.mlp.c_proj.weight"] = f, c
    return groups


def forms_of_all(model):
    """The packed weights as they must be: of each matrix its pairs and its flipped form, where the packing says."""
    packing, groups = dtypes.packing(model.layout, "bf16"), groups_of_all(model.shape)
    assert packing.places.keys() == groups.keys()
    packed = np.full(packing.size_bytes // 2, UNWRITTEN, np.uint16)
    written = np.zeros(packed.size, np.int64)
    for name, places in packing.places.items():
        matrix = spread(model.parameters[name], *groups[name])
        for form, place in zip(("pairs", "flipped"), places, strict=True):
            where = slice(place // 2, place // 2 + matrix.size)
            packed[where] = form_of(form, matrix)
            written[where] += 1
    assert (written == 1).all()  # the places neither overlap nor leave gaps
    return packed


class Packing:
    """A model's packed weights, unwritten at first, with margins."""

    def __init__(self, model):
        self.model, self.packing = model, dtypes.packing(model.layout, "bf16")
        self.units = self.packing.units + self.packing.frozen_units
        self.whole = np.full(self.packing.size_bytes // 2 + 2 * MARGIN, UNWRITTEN, np.uint16)
        self.packed = self.whole[MARGIN:-MARGIN]

    def pack(self, units):
        params_P, frozen_P = self.model.params_P, self.model.frozen_P
        for unit in units:
            self.packing.entry.call(
                self.packing.address, params_P.ctypes.data, frozen_P.ctypes.data, self.packed.ctypes.data, int(unit)
            )
        assert (self.whole[:MARGIN] == UNWRITTEN).all() and (self.whole[-MARGIN:] == UNWRITTEN).all()
        return self.packed


@pytest.fixture(params=SHAPES)
def model(whole, request):
    return whole(SHAPES[request.param], dtype="bf16")


def test_every_unit_once_gives_both_forms_of_every_matrix_and_writes_nothing_else(model):
    packing = Packing(model)
    expected = forms_of_all(model)
    assert (packing.pack(range(packing.units)) == expected).all()


def test_units_are_pure_and_their_order_and_repetition_change_nothing(model, rng):
    packing = Packing(model)
    first = packing.pack(range(packing.units)).copy()
    assert (packing.pack(range(packing.units)) == first).all()  # over what stands there
    for order in (range(packing.units)[::-1], rng.permutation(packing.units), rng.permutation(packing.units)):
        other = Packing(model)
        assert (other.pack([*order, *order[:3]]) == first).all()


def test_no_two_units_write_the_same_bytes_and_together_they_write_all(model):
    packing = Packing(model)
    times = np.zeros(packing.packed.size, np.int64)
    for unit in range(packing.units):
        times += Packing(model).pack([unit]) != UNWRITTEN
    assert (times == 1).all()


def test_units_of_trained_matrices_come_first_and_only_those_of_frozen_ones_read_frozen_parameters(whole):
    frozen = {"wte.weight", "h.0.attn.c_attn.weight", "h.1.mlp.c_fc.weight", "h.1.mlp.c_fc.bias"}
    model = whole(SHAPES["odd"], dtype="bf16", frozen=frozenset(frozen))
    expected = forms_of_all(model)
    packing = Packing(model)
    trained, all_units = packing.packing.units, packing.units
    assert 0 < trained < all_units
    assert (packing.pack(range(all_units)) == expected).all()
    model.frozen_P[:] = np.nan
    packing.packed[:] = UNWRITTEN
    packing.pack(range(trained))
    places = packing.packing.places
    ends = {name: 2 * flipped - pairs for name, (pairs, flipped) in places.items()}
    for name, (pairs, _) in places.items():
        found = packing.packed[pairs // 2 : ends[name] // 2]
        wanted = UNWRITTEN if name in frozen else expected[pairs // 2 : ends[name] // 2]
        assert (found == wanted).all(), name


def test_what_lies_between_the_tensors_is_not_read(model):
    expected = Packing(model).pack(range(Packing(model).units)).copy()
    between_P = np.ones(model.layout.size, bool)
    for tensor in model.layout.tensors:
        between_P[tensor.offset : tensor.offset + tensor.size] = False
    model.params_P[between_P] = np.nan
    assert (Packing(model).pack(range(Packing(model).units)) == expected).all()


@pytest.mark.parametrize("workers", [1, 2, 7, 63])
def test_any_number_of_workers_shares_out_every_unit_once(model, workers):
    units = Packing(model).units
    runs = [range(w * units // workers, (w + 1) * units // workers) for w in range(workers)]  # as in spheres/phases.py
    assert sorted(unit for run in runs for unit in run) == list(range(units))
    packing = Packing(model)
    for run in reversed(runs):
        packing.pack(run)
    assert (packing.packed == forms_of_all(model)).all()
