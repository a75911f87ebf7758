"""The float32 weights -> the form in which the kernels of a dtype read them, rebuilt at the start of every step.

The work is cut into units that any worker may do in any order: a unit is a pure function of the weights, and no two
units write the same bytes. Float32 kernels read the weights as they are: nothing is packed.
"""

from __future__ import annotations

from numba import types

from cllm_spheres.crystal.jit import entry
from cllm_spheres.model.layout import Layout

_i8 = types.int64


def packed_sizes(layout: Layout, dtype: str) -> tuple[int, int]:
    """(bytes of all packed weights, units of work that fill them); (0, 0) where nothing is packed."""
    if dtype != "fp32":
        raise ValueError(f"no kernels for dtype {dtype!r}")
    return 0, 0


@entry(_i8(_i8, _i8, _i8, _i8))
def pack_unit(geometry, params, packed, unit):
    """Fill one unit of the packed weights; returns 0. Addresses: geometry int64, params float32, packed bytes."""
    return 0
