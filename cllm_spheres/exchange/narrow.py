"""float32 weights -> the dtype of a file: f32, f16 or bf16, rounded to the nearest, ties to even."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cllm_spheres.errors import InputError, nearest

DTYPES = ("f32", "f16", "bf16")
SAFETENSORS = {"float32": "F32", "uint16": "BF16", "float16": "F16"}  # what `narrow` returns -> a safetensors dtype
TORCH = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def check_dtype(dtype: str, known: Sequence[str], to: str) -> None:
    """InputError names the nearest one that the target knows."""
    if dtype not in known:
        raise InputError(f"--dtype cannot be {dtype!r} with --to {to}: {nearest(dtype, known)}")


def narrow(name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 -> float32, float16, or uint16 with the bits of bfloat16. InputError where a weight overflows."""
    if dtype == "f32":
        return values
    narrowed: np.ndarray
    largest = float(np.abs(values).max(initial=0))
    if dtype == "f16":
        with np.errstate(over="ignore"):
            narrowed = values.astype(np.float16)
        overflows = not np.isfinite(narrowed).all()
    else:
        bits = np.ascontiguousarray(values).view(np.uint32)
        narrowed = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
        overflows = bool(((narrowed & 0x7F80) == 0x7F80).any())
    if overflows:
        most = 65504.0 if dtype == "f16" else 3.3895313892515355e38
        others = "bf16 or f32" if dtype == "f16" else "f32"
        raise InputError(
            f"--dtype {dtype}: {name} has a weight of size {largest:g}, and {dtype} ends at {most:g}. Take {others}."
        )
    return narrowed
