"""float32 matrices -> ggml's blocks of 32 numbers of 8 or 4 bits that share a scale in float16, by the package gguf.

A block lies within a row, so rows must be a multiple of 32 long. Other matrices are kept in f16, as llama.cpp's own
converter does.
"""

from __future__ import annotations

import re
from types import ModuleType

import numpy as np

from cllm_spheres.errors import InputError
from cllm_spheres.model.description import Tensor
from cllm_spheres.model.families import described, tensors_of
from cllm_spheres.model.shape import Shape

BLOCK = 32
QUANTISED = {"q8_0": 127, "q4_0": 8}  # dtype -> the largest number of a block in units of its scale
LATER_LAYER = re.compile(r"blk\.[1-9]")


def can_be_quantised(row_length: int) -> bool:
    return row_length % BLOCK == 0


def is_turned(tensor: Tensor) -> bool:
    """Whether a matrix stands as [in, out] in our files, and as [out, in] in GGUF's."""
    return len(tensor.shape) == 2 and not (tensor.transposed or tensor.looked_up)


def kept_in_f16(shape: Shape, dtype: str) -> tuple[str, ...]:
    """A sentence on the matrices that cannot be quantised. InputError where none can."""
    if dtype not in QUANTISED:
        return ()
    positions = described(shape).embedding.positions
    lengths: dict[int, list[str]] = {}  # of a row -> the matrices, those of the first layer for all
    for tensor in tensors_of(shape):
        if len(tensor.shape) == 2 and tensor.name != positions and not LATER_LAYER.match(tensor.gguf):
            name = tensor.gguf.removeprefix("blk.0.").removesuffix(".weight")
            lengths.setdefault(tensor.shape[0 if is_turned(tensor) else 1], []).append(name)
    why = f"{dtype} wants rows of a multiple of {BLOCK} numbers"
    if not any(map(can_be_quantised, lengths)):
        have = " and ".join(f"{length} ({', '.join(names)})" for length, names in lengths.items())
        raise InputError(f"--dtype {dtype}: {why}, and here they have {have}. Take f16.")
    return tuple(
        f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} in f16: {why}, and here they have {length}."
        for length, names in lengths.items()
        if not can_be_quantised(length)
    )


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
