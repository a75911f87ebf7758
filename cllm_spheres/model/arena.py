"""A number of floats -> memory for them, aligned as the kernels like it."""

from __future__ import annotations

import numpy as np

from cllm_spheres.kernels.sizes import ALIGN


def new_arena(floats: int) -> np.ndarray:
    """float32 aligned to a cache line; its pages are taken as they are first written."""
    buffer = np.empty(floats + ALIGN, np.float32)
    start = -(buffer.ctypes.data // 4) % ALIGN
    return buffer[start : start + floats]
