"""A model's shape -> where each named tensor lies in a flat buffer of parameters.

There are two buffers: of the parameters that are trained, over which blocks, moments and segments go, and of the
frozen ones, which are only read. In each, tensors start at multiples of 16 floats; those that decay (matrices) come
first and end at a whole block of 4,096, then the others. Padding is zero and stays zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from cllm_spheres.kernels.sizes import ALIGN, BLOCK
from cllm_spheres.model.description import Tensor
from cllm_spheres.model.families import tensors_of
from cllm_spheres.model.shape import Shape


@dataclass(frozen=True)
class Placed:
    """A tensor, and where it begins in its buffer, in floats."""

    tensor: Tensor
    offset: int

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def size(self) -> int:
        return math.prod(self.tensor.shape)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _place(tensors: list[Tensor]) -> tuple[tuple[Placed, ...], int, int]:
    """Places, floats of those that decay, floats of all: whole blocks."""
    placed, offset, decaying = [], 0, 0
    for decays in (True, False):
        for tensor in tensors:
            if tensor.decays == decays:
                placed.append(Placed(tensor, offset))
                offset = _round_up(offset + math.prod(tensor.shape), ALIGN)
        offset = _round_up(offset, BLOCK)
        decaying = offset if decays else decaying
    return tuple(placed), decaying, offset


@dataclass(frozen=True)
class Layout:
    """All tensors of a shape. `size` and `frozen_size` count padded floats, multiples of 4,096.

    frozen: the names of tensors that are not trained. ValueError for one that the model does not have.
    """

    shape: Shape
    frozen: frozenset[str] = frozenset()
    tensors: tuple[Placed, ...] = field(init=False)  # that are trained
    frozen_tensors: tuple[Placed, ...] = field(init=False)
    size: int = field(init=False)
    frozen_size: int = field(init=False)
    decaying_blocks: int = field(init=False)

    def __post_init__(self) -> None:
        tensors = tensors_of(self.shape)
        if unknown := self.frozen - {t.name for t in tensors}:
            raise ValueError(f"there are no tensors {sorted(unknown)[:5]} to freeze")
        trained, decaying, size = _place([t for t in tensors if t.name not in self.frozen])
        frozen, _, frozen_size = _place([t for t in tensors if t.name in self.frozen])
        for name, value in dict(
            tensors=trained, frozen_tensors=frozen, size=size, frozen_size=frozen_size,
            decaying_blocks=decaying // BLOCK,
        ).items():  # fmt: skip
            object.__setattr__(self, name, value)

    @property
    def num_blocks(self) -> int:
        return self.size // BLOCK

    @property
    def num_parameters(self) -> int:
        """Real parameters, without padding, of which frozen ones are a part."""
        return sum(tensor.size for tensor in (*self.tensors, *self.frozen_tensors))

    def views(self, buffer_P: np.ndarray) -> dict[str, np.ndarray]:
        """Name -> view into a flat float32 buffer of `size` floats, of the tensors that are trained."""
        return {t.name: buffer_P[t.offset : t.offset + t.size].reshape(t.shape) for t in self.tensors}

    def frozen_views(self, buffer_P: np.ndarray) -> dict[str, np.ndarray]:
        """Name -> view into a flat float32 buffer of `frozen_size` floats, of the frozen tensors."""
        return {t.name: buffer_P[t.offset : t.offset + t.size].reshape(t.shape) for t in self.frozen_tensors}

    def fill(self, buffer_P: np.ndarray, tensors: Mapping[str, np.ndarray]) -> None:
        """Copy named tensors into the buffer; ValueError names what is missing, too many or of another shape."""
        views = self.views(buffer_P)
        if views.keys() != tensors.keys():
            missing, extra = sorted(views.keys() - tensors.keys()), sorted(tensors.keys() - views.keys())
            raise ValueError(f"tensors are missing: {missing[:5]}; and not known: {extra[:5]}")
        for name, view in views.items():
            if tensors[name].shape != view.shape:
                raise ValueError(f"{name} has shape {tensors[name].shape}, expected {view.shape}")
            view[...] = tensors[name]
