"""Whole models with weights, gradients and tokens to give to the compiled entries of either dtype."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from cllm_spheres.model import dtypes
from cllm_spheres.model.families import tensors_of
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.shape import Shape
from cllm_spheres.model.workspace import Workspace

DTYPES = [
    "fp32",
    pytest.param("bf16", marks=pytest.mark.skipif(dtypes.usable("bf16") != "bf16", reason="no AVX512-BF16 here")),
]


@dataclass
class Whole:
    """A model on its flat buffers. Weights are so large that every part of it counts; the arenas begin as NaN."""

    shape: Shape
    largest_shard: int = 100
    dropout: float = 0.0
    dtype: str = "fp32"
    size: float = 0.3  # of the weights of matrices
    recompute: str = "none"
    frozen: frozenset[str] = frozenset()
    layout: Layout = field(init=False)

    def __post_init__(self):
        self.layout = Layout(self.shape, self.frozen)
        rng = np.random.default_rng(3)
        self.params_P = np.zeros(self.layout.size, np.float32)
        self.frozen_P = np.zeros(self.layout.frozen_size, np.float32)
        self.parameters = self.layout.views(self.params_P) | self.layout.frozen_views(self.frozen_P)
        for tensor in tensors_of(self.shape):
            view, deviation = self.parameters[tensor.name], self.size if len(tensor.shape) == 2 else 0.5
            view[...] = rng.standard_normal(view.shape) * deviation + tensor.constant
        self.workspaces = {purpose: self._workspace(purpose) for purpose in ("train", "evaluate")}
        self.arena = self.workspaces["train"].arena

    def _workspace(self, purpose, dtype=None):
        work = Workspace(
            self.layout, self.params_P, dtype or self.dtype, purpose=purpose, largest_shard=self.largest_shard,
            dropout=self.dropout, recompute=self.recompute, frozen_P=self.frozen_P,
        )  # fmt: skip
        work.arena[:] = np.nan
        return work

    def batch(self, count, length=None):
        rng = np.random.default_rng(4)
        shape = (count, length or self.shape.block_size)
        return tuple(rng.integers(0, self.shape.vocab_size, shape).astype(np.int32) for _ in range(2))

    def pack(self, purpose="train"):
        """Fill the packed weights from the parameters; nothing where none are packed."""
        self.workspaces[purpose].packed[:] = np.nan
        self.workspaces[purpose].pack()

    def shard(self, inputs_BT, targets_BT, scale, key=0, first_sequence=0, soft=0):
        """The summed loss, and the segment, which begins as NaN where a tensor is and as zero between them.

        soft: the address of a card of soft targets.
        """
        loss, excess, segment_P = self.losses(inputs_BT, targets_BT, scale, key, first_sequence, soft)
        return loss + excess, segment_P

    def losses(self, inputs_BT, targets_BT, scale, key=0, first_sequence=0, soft=0):
        """Cross-entropy, what soft targets add to it, and the segment."""
        segment_P = np.zeros(self.layout.size, np.float32)
        for view in self.layout.views(segment_P).values():
            view[...] = np.nan
        self.pack()
        found = self.workspaces["train"].shard(
            inputs_BT, targets_BT, segment_P, scale, key=key, first_sequence=first_sequence, soft=soft
        )
        return *found, segment_P

    def window(self, inputs_T, targets_T):
        return self.scored(inputs_T, targets_T, 0)[0]

    def scored(self, inputs_T, targets_T, first):
        """Loss and right predictions of the rows from `first` on."""
        self.pack("evaluate")
        return self.workspaces["evaluate"].window(inputs_T, targets_T, first)

    def logits(self, inputs_T, first_row=0):
        """Of float32 alone: there is no other inference."""
        return self._workspace("logits", "fp32").logits(inputs_T, first_row)


@pytest.fixture
def whole():
    return Whole


@pytest.fixture(params=DTYPES)
def dtype(request) -> str:
    return request.param
