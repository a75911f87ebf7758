"""safetensors files from elsewhere: read as the library reads them, and refused in words where they are damaged."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from cllm_spheres.errors import InputError
from cllm_spheres.exchange.safetensors_file import read_header


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensor(begin=0, end=8, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_what_the_library_writes_is_read_with_the_same_values(tmp_path, rng):
    arrays = {
        "a": rng.normal(size=(3, 5)).astype(np.float32), "b": rng.normal(size=7).astype(np.float16),
        "scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 4), np.float32),
    }  # fmt: skip
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    entries = read_header(tmp_path / "x.safetensors")
    assert entries.keys() == arrays.keys()
    for name, array in arrays.items():
        read = entries[name].read()
        assert read.dtype == np.float32 and read.shape == array.shape and np.array_equal(read, array)


def test_bfloat16_is_the_upper_half_of_float32(tmp_path):
    values = np.array([1.0, -2.5, 3.0e38, 1.0e-40], np.float32)
    halves = (values.view(np.uint32) >> 16).astype("<u2")
    path = write(tmp_path / "x", {"w": tensor(dtype="BF16", shape=(4,))}, halves.tobytes())
    expected = (halves.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(read_header(path)["w"].read(), expected)
    assert np.allclose(expected[:3], values[:3], rtol=2**-7)  # the seven bits that are left of a mantissa


DATA = bytes(16)
DAMAGED = {
    "empty": (b"", None, b"", "0 bytes"),
    "cut in the length": (b"", 3, b"", None),
    "huge header": ({"w": tensor()}, 2**63, DATA, "9,223,372,036,854,775,808"),
    "header longer than the file": ({"w": tensor()}, 500, b"", "500"),
    "no JSON": (b"{not json", None, DATA, "no JSON"),
    "a list": (b"[]", None, DATA, "no JSON object"),
    "nested without end": (b"[" * 100_000, None, DATA, "no JSON"),
    "offsets outside": ({"w": tensor(12, 20)}, None, DATA, "[12, 20] in 16 bytes"),
    "offsets backwards": ({"w": tensor(8, 0)}, None, DATA, "[8, 0]"),
    "three offsets": ({"w": {**tensor(), "data_offsets": [0, 4, 8]}}, None, DATA, "[0, 4, 8]"),
    "overlapping": ({"v": tensor(0, 8), "w": tensor(4, 12)}, None, DATA, "'v' and 'w' overlap"),
    "shape and bytes differ": ({"w": tensor(shape=(3,))}, None, DATA, "needs 12 bytes and has 8"),
    "huge shape": ({"w": tensor(shape=(2**40, 2**40))}, None, DATA, "bytes and has 8"),
    "negative shape": ({"w": tensor(shape=(-2, -1))}, None, DATA, "shape [-2, -1]"),
    "unknown dtype": ({"w": tensor(dtype="Q4")}, None, DATA, "dtype 'Q4'"),
    "dtype is a list": ({"w": tensor(dtype=["F32"])}, None, DATA, "dtype ['F32']"),
    "no record": ({"w": 5}, None, DATA, "no dtype"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_header_is_named(tmp_path, name):
    header, length, data, said = DAMAGED[name]
    path = tmp_path / "model.safetensors"
    if header == b"":
        path.write_bytes(bytes(length or 0))
    else:
        write(path, header, data, length)
    with pytest.raises(InputError, match="is damaged") as caught:
        read_header(path)
    assert said is None or said in str(caught.value)


def test_a_folder_a_pipe_and_nothing_are_no_file(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    for name in (".", "pipe", "nothing"):
        with pytest.raises(InputError):
            read_header(tmp_path / name)


@given(st.binary(max_size=200), st.integers(0, 2**64 - 1))
def test_no_bytes_bring_a_traceback(tmp_path_factory, data, length):
    path = tmp_path_factory.mktemp("x") / "x"
    for content in (data, length.to_bytes(8, "little") + data, len(data).to_bytes(8, "little") + data):
        path.write_bytes(content)
        with contextlib.suppress(InputError):
            assert read_header(path) == {}


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda s: st.lists(s, max_size=3)))
def test_no_json_in_a_header_brings_a_traceback(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("x") / "x"
    for key in ("dtype", "shape", "data_offsets"):
        write(path, {"w": {**tensor(), key: value}}, DATA)
        with contextlib.suppress(InputError):
            read_header(path)
