"""A model's shape -> where each named tensor lies in the flat buffer of parameters.

Names and shapes are those of GPT-2's own checkpoints (linear weights are [in, out]), so that other tools read our
files. Tensors start at multiples of 16 floats; tensors that decay (matrices) come first and end at a whole block
of 4,096, then the others. Padding is zero and stays zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from cllm_spheres.kernels.sizes import ALIGN, BLOCK


@dataclass(frozen=True)
class Shape:
    """The sizes of a model."""

    vocab_size: int
    block_size: int
    layers: int
    heads: int
    width: int
    ff_width: int
    bias: bool = True


@dataclass(frozen=True)
class Tensor:
    """One named tensor: its place in the flat buffer."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))


# The kernels find the tensors of a layer by these indices.
LAYER_TENSORS = (
    "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight",
    "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias",
    "attn.c_attn.bias", "attn.c_proj.bias", "mlp.c_fc.bias", "mlp.c_proj.bias",
)  # fmt: skip
(W_QKV, W_ATT, W_UP, W_DOWN, G_LN1, B_LN1, G_LN2, B_LN2, B_QKV, B_ATT, B_UP, B_DOWN) = range(12)


def tensor_shapes(shape: Shape) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The tensors that decay and those that do not: name -> shape, in their order in the buffer."""
    c, f = shape.width, shape.ff_width
    one_layer: dict[str, tuple[int, ...]] = {
        "attn.c_attn.weight": (c, 3 * c), "attn.c_proj.weight": (c, c),
        "mlp.c_fc.weight": (c, f), "mlp.c_proj.weight": (f, c),
        "ln_1.weight": (c,), "ln_1.bias": (c,), "ln_2.weight": (c,), "ln_2.bias": (c,),
        "attn.c_attn.bias": (3 * c,), "attn.c_proj.bias": (c,), "mlp.c_fc.bias": (f,), "mlp.c_proj.bias": (c,),
    }  # fmt: skip
    matrices: dict[str, tuple[int, ...]] = {
        "wte.weight": (shape.vocab_size, c),
        "wpe.weight": (shape.block_size, c),
    }
    vectors: dict[str, tuple[int, ...]] = {}
    for layer in range(shape.layers):
        for name, dims in one_layer.items():
            if len(dims) == 2:
                matrices[f"h.{layer}.{name}"] = dims
            elif shape.bias or not name.endswith(".bias"):
                vectors[f"h.{layer}.{name}"] = dims
    vectors["ln_f.weight"] = (c,)
    if shape.bias:
        vectors["ln_f.bias"] = (c,)
    return matrices, vectors


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


@dataclass(frozen=True)
class Layout:
    """All tensors of a shape. `size` counts the padded floats, a multiple of 4,096."""

    shape: Shape
    tensors: tuple[Tensor, ...] = field(init=False)
    size: int = field(init=False)
    decaying_blocks: int = field(init=False)

    def __post_init__(self) -> None:
        tensors, offset = [], 0
        matrices, vectors = tensor_shapes(self.shape)
        for group in (matrices, vectors):
            for name, dims in group.items():
                tensors.append(Tensor(name, dims, offset))
                offset = _round_up(offset + int(np.prod(dims)), ALIGN)
            offset = _round_up(offset, BLOCK)
            if group is matrices:
                object.__setattr__(self, "decaying_blocks", offset // BLOCK)
        object.__setattr__(self, "tensors", tuple(tensors))
        object.__setattr__(self, "size", offset)

    @property
    def num_blocks(self) -> int:
        return self.size // BLOCK

    @property
    def num_parameters(self) -> int:
        """Real parameters, without padding."""
        return sum(tensor.size for tensor in self.tensors)

    def views(self, buffer_P: np.ndarray) -> dict[str, np.ndarray]:
        """Name -> view into a flat float32 buffer of `size` floats."""
        return {t.name: buffer_P[t.offset : t.offset + t.size].reshape(t.shape) for t in self.tensors}

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

    def offset_of(self, name: str) -> int:
        """The offset of a tensor in floats; -1 where the shape has no such tensor (a bias left out)."""
        return next((t.offset for t in self.tensors if t.name == name), -1)
