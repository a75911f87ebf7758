"""A dtype -> the rules by which models are computed in it, and which dtype is worth it where.

"fp32" reads the weights as they are. "bf16" rounds the operands of all matrix products to bfloat16 and reads the
weights packed, which is done anew at the start of every step.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from cllm_spheres.crystal.cpu import bf16_backend
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.packed import Packing

DTYPES = ("fp32", "bf16")
# Below this width float32 is quicker than bfloat16 on AVX-512: rounding and packing take more than products save.
# Tokens/s of preset tiny, width 64, on two cores: 350,000 and 230,000; of small, width 128: 55,000 and 110,000.
NARROW = 96


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


def rules(dtype: str) -> ModuleType:
    """What each step of a model becomes in a dtype: rules/. ValueError for a dtype that has none."""
    check(dtype)
    return importlib.import_module(f"cllm_spheres.model.rules.{dtype}")


def packing(layout: Layout, dtype: str) -> Packing:
    """Where the packed weights of a dtype lie, and who fills them; without units where nothing is packed."""
    found: Packing = rules(dtype).packing(layout)
    return found


def load(dtype: str) -> None:
    """Import, and compile on a machine's first use, everything that computes in a dtype."""
    importlib.import_module("cllm_spheres.model.run")
    importlib.import_module(rules(dtype).OPS)
