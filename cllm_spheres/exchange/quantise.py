"""float32 matrices -> ggml's blocks of 32 numbers of 8 or 4 bits that share a scale in float16, by the package gguf.

A block lies within a row, so rows must be a multiple of 32 long: of all matrices but the last of a layer they are as
long as the width, of that one as the feed-forward width. Others are kept in f16, as llama.cpp's own converter does.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from cllm_spheres.errors import InputError
from cllm_spheres.model.shape import Shape

BLOCK = 32
QUANTISED = {"q8_0": 127, "q4_0": 8}  # dtype -> the largest number of a block in units of its scale


def can_be_quantised(row_length: int) -> bool:
    return row_length % BLOCK == 0


def kept_in_f16(shape: Shape, dtype: str) -> tuple[str, ...]:
    """A sentence on each kind of matrix that cannot be quantised. InputError where none can."""
    if dtype not in QUANTISED:
        return ()
    wide, deep = can_be_quantised(shape.width), can_be_quantised(shape.ff_width)
    why = f"{dtype} wants rows of a multiple of {BLOCK} numbers"
    if not (wide or deep):
        raise InputError(
            f"--dtype {dtype}: {why}, and they have {shape.width} (the width) and {shape.ff_width} (the feed-forward"
            " width) here. Take f16."
        )
    if not wide:
        return (
            f"Only the ffn_down of each layer is in {dtype}; the others are in f16: {why}, and have {shape.width}.",
        )
    if not deep:
        return (f"The ffn_down of each layer is in f16: {why}, and has {shape.ff_width}.",)
    return ()


def quantise(gguf: ModuleType, name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 [rows, row length] -> uint8 [rows, bytes of a row]. InputError where a weight overflows."""
    largest, most = float(np.abs(values).max(initial=0)), QUANTISED[dtype] * float(np.finfo(np.float16).max)
    if largest > most:
        raise InputError(
            f"--dtype {dtype}: {name} has a weight of size {largest:g}, and {dtype} ends at {most:g}. Take bf16 or f32."
        )
    with np.errstate(all="ignore"):  # of blocks so small that their scale is 0
        quantised: np.ndarray = gguf.quantize(values, gguf.GGMLQuantizationType[dtype.upper()])
    return quantised
