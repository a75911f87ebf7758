"""A safetensors file from elsewhere -> its header, checked, and its tensors as float32, one at a time.

The library reads no bfloat16 without torch and says little of what is wrong; the format is small:
8 bytes, the length of the header; the header, JSON: name -> dtype, shape, data_offsets; then the data.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np

from cllm_spheres.errors import InputError, shown

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1,
    "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16")  # that can be weights


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: where its bytes are."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def read(self) -> np.ndarray:
        """Its values, exactly, as a float32 array of its own. InputError where the file has changed meanwhile."""
        assert self.dtype in FLOATS, self.dtype
        try:
            with self.file.open("rb") as file:
                file.seek(self.begin)
                data = file.read(self.end - self.begin)
        except OSError as error:
            raise InputError(f"Cannot read {self.file}: {error.strerror}.") from None
        if len(data) != self.end - self.begin:
            raise InputError(f"{self.file} has become shorter while it was read.")
        if self.dtype == "F32":
            values = np.frombuffer(data, "<f4").astype(np.float32)
        elif self.dtype == "F16":
            values = np.frombuffer(data, "<f2").astype(np.float32)
        else:  # the upper half of a float32
            values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        return values.reshape(self.shape)


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of a file by name. InputError says what is wrong with the header, with the numbers."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not wait for its writer
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise InputError(f"{path} is not a file.")
    with open(descriptor, "rb") as file:
        size = status.st_size
        if size < 8:
            raise _damaged(path, f"it has {size} bytes, and its header's length alone takes 8")
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise _damaged(
                path, f"its header should have {length:,} bytes; {size - 8:,} follow, and {MAX_HEADER_BYTES:,} are"
                " allowed"
            )  # fmt: skip
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is no JSON ({shown(str(error))})") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    start, room = 8 + length, size - 8 - length
    entries = {name: _entry(path, name, record, start, room) for name, record in header.items()}
    end, before = start, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < end:
            raise _damaged(path, f"{shown(before)} and {shown(name)} overlap")
        end, before = entry.end, name
    return entries


def _entry(path: Path, name: str, record: object, start: int, room: int) -> Entry:
    if not isinstance(record, dict):
        raise _damaged(path, f"{shown(name)} has no dtype, shape and data_offsets")
    dtype, shape, offsets = record.get("dtype"), record.get("shape"), record.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise _damaged(path, f"{shown(name)} has dtype {shown(dtype)}; known are {', '.join(_BYTES)}")
    if not _are_counts(shape):
        raise _damaged(path, f"{shown(name)} has shape {shown(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= room:
        raise _damaged(path, f"{shown(name)} has data_offsets {shown(offsets)} in {room:,} bytes of data")
    needed = _BYTES[dtype]
    for n in shape:
        needed *= n
    if offsets[1] - offsets[0] != needed:
        raise _damaged(
            path, f"{shown(name)} of shape {shown(shape)} in {dtype} needs {needed:,} bytes and has"
            f" {offsets[1] - offsets[0]:,}"
        )  # fmt: skip
    return Entry(path, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path} is damaged: {what}. Save or copy the model again.")
