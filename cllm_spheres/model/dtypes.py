"""A dtype -> its kernels, and what they need: where the shard's arena and the packed weights lie.

"fp32" reads the weights as they are. "bf16" rounds the operands of all matrix products to bfloat16 and reads the
weights packed, which is done anew at the start of every step. Kernels are loaded, and compiled, when they are asked
for.
"""

from __future__ import annotations

from dataclasses import dataclass

from cllm_spheres.crystal.cpu import bf16_backend
from cllm_spheres.crystal.jit import Entry
from cllm_spheres.model import geometry as fp32
from cllm_spheres.model import geometry_bf16 as bf16
from cllm_spheres.model.geometry import Geometry
from cllm_spheres.model.layout import Layout

DTYPES = ("fp32", "bf16")
# Below this width float32 is quicker than bfloat16 on AVX-512: rounding and packing take more than products save.
# Tokens/s of preset tiny, width 64, on two cores: 350,000 and 230,000; of small, width 128: 55,000 and 110,000.
NARROW = 96


@dataclass(frozen=True)
class Entries:
    """The machine code of a dtype. pack_unit is None where nothing is packed."""

    compute_shard: Entry
    evaluate_window: Entry
    pack_unit: Entry | None


def check(dtype: str) -> None:
    """ValueError for a dtype that has no kernels."""
    if dtype not in DTYPES:
        raise ValueError(f"no kernels for dtype {dtype!r}, only for {' and '.join(DTYPES)}")


def usable(dtype: str) -> str:
    """What is computed in where `dtype` is asked for: float32 stands in for bfloat16 where there is none."""
    return "bf16" if dtype != "fp32" and bf16_backend() else "fp32"


def choose(dtype: str, width: int) -> str:
    """What a model of this width is trained in where `dtype` is asked for: "auto" is the fastest.

    A function of width and CPU alone: nothing that changes bits is chosen by timing.
    """
    if dtype == "auto" and width < NARROW and bf16_backend() == "avx512":
        return "fp32"
    return usable(dtype)


def describe(dtype: str) -> str:
    """What is computed in where `dtype` is asked for, in words for the user."""
    if usable(dtype) == "bf16":
        return f"bfloat16 on {'AMX' if bf16_backend() == 'amx' else 'AVX-512'}"
    return "float32" + (", as this CPU has no bfloat16 arithmetic" if dtype == "bf16" else "")


def geometry(
    layout: Layout, dtype: str, *, largest_shard: int, dropout: float = 0.0, backward: bool = True
) -> Geometry:
    """Where everything lies for the kernels of a dtype. Without `backward` all layers share one place."""
    check(dtype)
    of_dtype = bf16.geometry if dtype == "bf16" else fp32.geometry
    return of_dtype(layout, largest_shard=largest_shard, dropout=dropout, backward=backward)


def packed_sizes(layout: Layout, dtype: str) -> tuple[int, int]:
    """(bytes of all packed weights, units of work that fill them); (0, 0) where nothing is packed."""
    check(dtype)
    if dtype == "fp32":
        return 0, 0
    packed = bf16.packed(layout)
    return packed.size_bytes, packed.units


def entries(dtype: str) -> Entries:
    """The kernels of a dtype, compiled on a machine's first use."""
    check(dtype)
    if dtype == "bf16":
        from cllm_spheres.model.gpt_bf16 import compute_shard_bf16, evaluate_window_bf16
        from cllm_spheres.model.packing import pack_unit_bf16

        return Entries(compute_shard_bf16, evaluate_window_bf16, pack_unit_bf16)
    from cllm_spheres.model.gpt import compute_shard, evaluate_window

    return Entries(compute_shard, evaluate_window, None)
