"""The card of a bfloat16 model -> addresses of what it places: tensors, packed matrices, activations of a layer."""

from __future__ import annotations

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels.arrays import integers
from cllm_spheres.kernels.bf16.tiles import padded
from cllm_spheres.model import geometry_bf16 as G
from cllm_spheres.model.layout import LAYER_TENSORS

PER_LAYER = len(LAYER_TENSORS)


@kernel
def card(address):
    """The geometry's array; its length depends on the numbers of layers and matrices, which stand in it."""
    scalars = integers(address, G.LAYER_OFFSETS)
    return integers(address, G.LAYER_OFFSETS + scalars[G.LAYERS] * PER_LAYER + scalars[G.MATRICES] * G.MATRIX_WORDS)


@kernel
def matrix_at(g, number):
    """Where a packed matrix's numbers stand in the card."""
    return G.LAYER_OFFSETS + g[G.LAYERS] * PER_LAYER + number * G.MATRIX_WORDS


@kernel
def weights(g, packed, number):
    """Addresses of a packed matrix's two forms: pairs and flipped."""
    m = matrix_at(g, number)
    return packed + g[m + G.M_PAIRS], packed + g[m + G.M_FLIPPED]


@kernel
def tensor(g, layer, which):
    """Where a layer's tensor lies among the parameters; negative where the model has none."""
    return g[G.LAYER_OFFSETS + layer * PER_LAYER + which]


@kernel
def head_columns(g):
    """Columns of all heads together, each head padded."""
    return g[G.HEADS] * padded(g[G.WIDTH] // g[G.HEADS])


@kernel
def activations(g, arena, layer):
    """Addresses in a layer's part of the arena: what the forward leaves and the backward reads."""
    at = arena + layer * g[G.LAYER_BYTES]
    return (
        at + g[G.X], at + g[G.LN1], at + g[G.QKV], at + g[G.LSE], at + g[G.ATT], at + g[G.MID], at + g[G.LN2],
        at + g[G.UP], at + g[G.ACT], at + g[G.STATS],
    )  # fmt: skip
