"""What both forms of the model read out of their cards in the same way."""

from __future__ import annotations

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels.arrays import f4, floats


@kernel
def vector(base, offset, size):
    """A vector in a buffer of parameters or gradients; of length 0 where the model has none (no biases)."""
    return floats(base + 4 * max(offset, 0), size if offset >= 0 else 0)


@kernel
def dropout_of(threshold, key):
    """Threshold and scale of dropout; threshold 0, no dropout, where there is no key."""
    return threshold if key != 0 else 0, f4(1.0 / (1.0 - threshold / 4294967296.0))
