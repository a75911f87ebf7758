"""Named arrays <-> the bytes of a safetensors file, without a second copy of the arrays.

Written here, byte for byte as the safetensors library writes (a test compares), because the library neither
hashes while it writes nor lets a single write be made to fail. Read by the library, which checks the header.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from cllm_spheres.checkpoint.files import Damaged
from cllm_spheres.errors import shown

# In the file the largest elements come first, so that all are aligned: the library's order.
DTYPES = {
    "uint64": "U64", "int64": "I64", "float64": "F64", "float32": "F32", "uint32": "U32", "int32": "I32",
    "uint16": "U16", "int16": "I16", "int8": "I8", "uint8": "U8",
}  # fmt: skip
METADATA = {"format": "pt"}  # Hugging Face's loader insists on it


class File:
    """The bytes that `arrays` will have: `size_bytes`, and `chunks()`.

    Arrays of any shape, in native order. One that is not C-contiguous is copied when its turn comes.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], spelled: Mapping[str, str] = DTYPES) -> None:
        """spelled: numpy's dtype -> the file's, for those that the arrays may have."""
        for name, array in arrays.items():
            if array.dtype.name not in spelled or not array.dtype.isnative:
                raise ValueError(f"Tensor {name!r} has dtype {array.dtype}: known are {', '.join(spelled)}")
        order = list(spelled)
        self._arrays = sorted(arrays.items(), key=lambda item: (order.index(item[1].dtype.name), item[0]))
        header: dict[str, object] = {"__metadata__": METADATA}
        offset = 0
        for name, array in self._arrays:
            header[name] = {
                "dtype": spelled[array.dtype.name],
                "shape": list(array.shape),
                "data_offsets": [offset, offset + array.nbytes],
            }
            offset += array.nbytes
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self.size_bytes = len(self._head) + offset

    def chunks(self) -> Iterator[memoryview]:
        """The header, then each array's own memory."""
        yield memoryview(self._head)
        for _, array in self._arrays:
            yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def check(folder: Path, name: str, only: str | None = None) -> None:
    """The header fits the file's size and its dtypes are known (all `only`, if given). Raises Damaged."""
    known = {only} if only else set(DTYPES.values())
    with _opened(folder, name) as file:
        for key in file.keys():  # noqa: SIM118
            dtype = file.get_slice(key).get_dtype()
            if dtype not in known:
                raise Damaged(folder, f"{name} holds {shown(key)} as {dtype}, expected {only or 'a known dtype'}")


def shapes(folder: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Each tensor's name and shape, from the header alone. Raises Damaged."""
    with _opened(folder, name) as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def iterate(folder: Path, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor's name and its array, a writable copy: one in memory at a time. Raises Damaged."""
    with _opened(folder, name) as file:
        for key in file.keys():  # noqa: SIM118
            yield key, file.get_tensor(key)


@contextlib.contextmanager
def _opened(folder: Path, name: str) -> Iterator[Any]:
    """A file as the library reads it; what it says about one that it cannot read becomes Damaged."""
    try:
        with safetensors.safe_open(folder / name, framework="numpy") as file:
            yield file
    except (safetensors.SafetensorError, OSError, UnicodeError) as error:
        raise Damaged(folder, f"{name} cannot be read: {error}") from None
