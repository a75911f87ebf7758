"""(seed, block) -> the first weights of a block, as a pure function of where a weight is.
And token embeddings from the lattice of crystal/lattice.py, which take the place of the random ones.

The standard deviation and the mean of each tensor are those that its family gives (families/); padding is 0.
"""

from __future__ import annotations

import numpy as np
from numba import types

from cllm_spheres.crystal.jit import entry
from cllm_spheres.crystal.lattice import features
from cllm_spheres.crystal.random import PURPOSE_WEIGHTS, key_of, normal
from cllm_spheres.kernels.arrays import doubles, f4, floats, integers
from cllm_spheres.kernels.sizes import BLOCK
from cllm_spheres.model.families import described, tensors_of
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.shape import Shape


def initial_tables(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """For each tensor (start, end) int64 [n, 2], and (standard deviation, constant) float64 [n, 2]."""
    places = [(placed.offset, placed.offset + placed.size) for placed in layout.tensors]
    values = [(placed.tensor.deviation, placed.tensor.constant) for placed in layout.tensors]
    return np.array(places, np.int64), np.array(values, np.float64)


def lattice_embedding(order_R: np.ndarray, shape: Shape) -> tuple[str, np.ndarray]:
    """The name of the token embedding, and float32 [V, C]: each token's lattice features.

    They have the standard deviation that random ones would have. order_R: the token ids by falling frequency.
    """
    name = described(shape).embedding.tokens
    embedding = next(tensor for tensor in tensors_of(shape) if tensor.name == name)
    embedding_VC = np.empty(embedding.shape, np.float32)
    embedding_VC[order_R] = features(*embedding_VC.shape) * f4(embedding.deviation)
    return name, embedding_VC


@entry(types.int64(types.int64, types.int64, types.int64, types.int64, types.int64, types.int64))
def initialise_block(params, places, values, num_tensors, seed, block):
    """Write block `block` of the parameters; places and values are the addresses of `initial_tables`."""
    p = floats(params, (block + 1) * BLOCK)
    where, what = integers(places, 2 * num_tensors), doubles(values, 2 * num_tensors)
    key = key_of(seed, PURPOSE_WEIGHTS, 0)
    first, last = block * BLOCK, (block + 1) * BLOCK
    for i in range(first, last):
        p[i] = f4(0)
    for tensor in range(num_tensors):
        deviation, constant = what[2 * tensor], what[2 * tensor + 1]
        for i in range(max(first, where[2 * tensor]), min(last, where[2 * tensor + 1])):
            p[i] = f4(constant + (deviation * normal(key, i) if deviation > 0.0 else 0.0))
    return 0
