"""(seed, block) -> the first weights of a block: GPT-2's initialisation, as a pure function of where a weight is.
And token embeddings from the lattice of crystal/lattice.py, which take the place of the random ones.

Matrices: normal with standard deviation 0.02, the projections into the residual 0.02 / sqrt(2 layers); gains 1,
biases and padding 0. Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019).
"""

from __future__ import annotations

import math

import numpy as np
from numba import types

from cllm_spheres.crystal.jit import entry
from cllm_spheres.crystal.lattice import features
from cllm_spheres.crystal.random import PURPOSE_WEIGHTS, key_of, normal
from cllm_spheres.kernels.arrays import doubles, f4, floats, integers
from cllm_spheres.kernels.sizes import BLOCK
from cllm_spheres.model.layout import Layout

STANDARD_DEVIATION = 0.02


def initial_tables(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """For each tensor (start, end) int64 [n, 2], and (standard deviation, constant) float64 [n, 2]."""
    places, values = [], []
    residual = STANDARD_DEVIATION / math.sqrt(2 * layout.shape.layers)
    for tensor in layout.tensors:
        places.append((tensor.offset, tensor.offset + tensor.size))
        deviation = residual if tensor.name.endswith("c_proj.weight") else STANDARD_DEVIATION
        is_gain = tensor.name.endswith("weight") and len(tensor.shape) == 1
        values.append((deviation if len(tensor.shape) == 2 else 0.0, 1.0 if is_gain else 0.0))
    return np.array(places, np.int64), np.array(values, np.float64)


def lattice_embedding(order_R: np.ndarray, layout: Layout) -> np.ndarray:
    """float32 [V, C]: each token's lattice features, of the standard deviation that the others have.

    order_R: the token ids by falling frequency.
    """
    embedding_VC = np.empty((layout.shape.vocab_size, layout.shape.width), np.float32)
    embedding_VC[order_R] = features(*embedding_VC.shape) * f4(STANDARD_DEVIATION)
    return embedding_VC


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
