"""Whole models with weights, gradients and tokens to give to the compiled entries of either dtype."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from cllm_spheres.model.geometry import Geometry, new_arena

from cllm_spheres.kernels.sizes import PROGRESS_WORDS
from cllm_spheres.model import dtypes
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.shape import Shape

PROGRESS = np.zeros(PROGRESS_WORDS, np.int64)
DTYPES = [
    "fp32",
    pytest.param("bf16", marks=pytest.mark.skipif(dtypes.usable("bf16") != "bf16", reason="no AVX512-BF16 here")),
]


@dataclass
class Whole:
    """A model on its flat buffers. Weights are so large that every part of it counts; the arena begins as NaN."""

    shape: Shape
    largest_shard: int = 100
    dropout: float = 0.0
    dtype: str = "fp32"
    size: float = 0.3  # of the weights of matrices
    backward: bool = True
    layout: Layout = field(init=False)
    card: Geometry = field(init=False)

    def __post_init__(self):
        self.layout = Layout(self.shape)
        sizes = dict(largest_shard=self.largest_shard, dropout=self.dropout, backward=self.backward)
        self.card = dtypes.geometry(self.layout, self.dtype, **sizes)
        self.entries = dtypes.entries(self.dtype)
        size_bytes, self.units = dtypes.packed_sizes(self.layout, self.dtype)
        self.packed = new_arena(-(-size_bytes // 4))
        rng = np.random.default_rng(3)
        self.params_P = np.zeros(self.layout.size, np.float32)
        self.parameters = self.layout.views(self.params_P)
        for name, view in self.parameters.items():
            deviation = self.size if view.ndim == 2 else 0.5
            view[...] = rng.standard_normal(view.shape) * deviation + (name.endswith("weight") and view.ndim == 1)
        self.arena = new_arena(self.card.arena_floats)
        self.arena[:] = np.nan

    def batch(self, count, length=None):
        rng = np.random.default_rng(4)
        shape = (count, length or self.shape.block_size)
        return tuple(rng.integers(0, self.shape.vocab_size, shape).astype(np.int32) for _ in range(2))

    def pack(self):
        """Fill the packed weights from the parameters; nothing where none are packed."""
        self.packed[:] = np.nan
        for unit in range(self.units):
            self.entries.pack_unit.call(
                self.card.array.ctypes.data, self.params_P.ctypes.data, self.packed.ctypes.data, unit
            )

    def shard(self, inputs_BT, targets_BT, scale, key=0, first_sequence=0, soft=(0, 0)):
        """The summed loss, and the segment, which begins as NaN where a tensor is and as zero between them.

        soft: the addresses of a card of soft targets and of a float64.
        """
        segment_P = np.zeros(self.layout.size, np.float32)
        for view in self.layout.views(segment_P).values():
            view[...] = np.nan
        self.pack()
        loss = self.entries.compute_shard.call(
            self.card.array.ctypes.data, self.params_P.ctypes.data, self.packed.ctypes.data, segment_P.ctypes.data,
            self.arena.ctypes.data, inputs_BT.ctypes.data, targets_BT.ctypes.data, *inputs_BT.shape, scale, key,
            first_sequence, *soft, PROGRESS.ctypes.data,
        )  # fmt: skip
        return loss, segment_P

    def window(self, inputs_T, targets_T):
        return self.scored(inputs_T, targets_T, 0)[0]

    def scored(self, inputs_T, targets_T, first):
        """Loss and right predictions of the rows from `first` on."""
        self.pack()
        correct = np.array([-1], np.int64)
        loss = self.entries.evaluate_window.call(
            self.card.array.ctypes.data, self.params_P.ctypes.data, self.packed.ctypes.data, self.arena.ctypes.data,
            inputs_T.ctypes.data, targets_T.ctypes.data, len(inputs_T), first, correct.ctypes.data,
            PROGRESS.ctypes.data,
        )  # fmt: skip
        return loss, int(correct[0])

    def logits(self, inputs_T, first_row=0):
        """Of float32 alone: there is no other inference."""
        from cllm_spheres.model.gpt import compute_logits

        logits = np.full((len(inputs_T) - first_row, self.shape.vocab_size), np.nan, np.float32)
        compute_logits.call(
            self.card.array.ctypes.data, self.params_P.ctypes.data, self.arena.ctypes.data, inputs_T.ctypes.data,
            len(inputs_T), first_row, logits.ctypes.data, PROGRESS.ctypes.data,
        )  # fmt: skip
        return logits


@pytest.fixture
def whole():
    return Whole


@pytest.fixture(params=DTYPES)
def dtype(request) -> str:
    return request.param
