"""A checkpoint of a run -> a GGUF file that llama.cpp loads. Needs the package gguf (the extra `export`).

Matrices of products are [out, in] here. The output matrix is written where it is tied, too: not every reader ties it.
Vectors and positions stay float32, as llama.cpp's own converter leaves them; in a file of q4_0 the output matrix is
q8_0, because llama.cpp's own quantiser gives it more bits too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from cllm_spheres.errors import InputError
from cllm_spheres.exchange.gguf_vocabulary import vocabulary
from cllm_spheres.exchange.huggingface import stored_tensors
from cllm_spheres.exchange.narrow import narrow
from cllm_spheres.exchange.quantise import QUANTISED, can_be_quantised, is_turned, kept_in_f16, quantise
from cllm_spheres.exchange.source import Source
from cllm_spheres.exchange.target import check_file, write_file
from cllm_spheres.model.families import described, family_of

OUTPUT = "output.weight"
_FILE_TYPES = {
    "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0",
}  # fmt: skip


def export_gguf(source: Source, target: Path, dtype: str, force: bool) -> dict[str, int]:
    """Write the file `target`; its bytes by its name. InputError where it cannot be; nothing is left then."""
    gguf = _library()
    check_file(target, force)
    words = vocabulary(source.tokenizer)
    kept_in_f16(source.shape, dtype)  # refuses where nothing could be quantised
    weights = list(_tensors(gguf, source, dtype))

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(path, family_of(source.shape).files.architecture)
        try:
            _describe(writer, gguf, source, target.stem, dtype)
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre("gpt-2")
            writer.add_token_list(words.tokens)
            writer.add_token_types([gguf.TokenType.CONTROL if c else gguf.TokenType.NORMAL for c in words.is_control])
            writer.add_token_merges(words.merges)
            for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
                add(source.tokenizer.eot)
            writer.add_add_bos_token(False)
            for name, raw, stored in weights:
                kind = gguf.GGMLQuantizationType[stored.upper()]
                writer.add_tensor_info(name, raw.shape, raw.dtype, raw.nbytes, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, raw, _ in weights:
                writer.write_tensor_data(raw)
        finally:
            writer.close()

    return {target.name: write_file(target, write)}


def _library() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise InputError("--to gguf needs the package gguf. Install it: pip install 'cllm-spheres[export]'") from None
    return gguf


def _describe(writer: Any, gguf: ModuleType, source: Source, name: str, dtype: str) -> None:
    files = family_of(source.shape).files
    writer.add_name(name)
    for key, value in files.gguf_keys(source.shape).items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"{files.architecture}.{key}", value)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    if dtype in QUANTISED:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _tensors(gguf: ModuleType, source: Source, dtype: str) -> Iterator[tuple[str, np.ndarray, str]]:
    """llama.cpp's names, the bytes of C-contiguous arrays as uint8 of the same dimensions, and the dtypes."""
    description = described(source.shape)
    head, positions = description.output.weight, description.embedding.positions
    for tensor, values in stored_tensors(source):
        if is_turned(tensor):
            values = np.ascontiguousarray(values.T)
        stored = _stored(gguf, tensor.name, values, "f32" if tensor.name == positions else dtype)
        if tensor.gguf != OUTPUT:
            yield tensor.gguf, *stored
        if tensor.name == head:
            yield OUTPUT, *(_stored(gguf, tensor.name, values, "q8_0") if dtype == "q4_0" else stored)


def _stored(gguf: ModuleType, name: str, values: np.ndarray, dtype: str) -> tuple[np.ndarray, str]:
    """The bytes of a tensor, and the dtype that it can have."""
    if values.ndim == 1:
        dtype = "f32"
    elif dtype in QUANTISED and not can_be_quantised(values.shape[1]):
        dtype = "f16"
    if dtype in QUANTISED:
        return quantise(gguf, name, values, dtype), dtype
    return narrow(name, values, dtype).view(np.uint8), dtype
