"""A checkpoint of a run -> a GGUF file that llama.cpp loads. Needs the package gguf (the extra `export`).

GPT-2's matrices are [in, out] in our files and [out, in] here. The output matrix is written though it is tied: not
every reader ties it. Vectors and positions stay float32, as llama.cpp's own converter leaves them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from cllm_spheres.errors import InputError
from cllm_spheres.exchange.gguf_vocabulary import vocabulary
from cllm_spheres.exchange.huggingface import with_biases
from cllm_spheres.exchange.narrow import narrow
from cllm_spheres.exchange.source import Source
from cllm_spheres.exchange.target import check_file, write_file

_TOP = {
    "wte.weight": "token_embd.weight", "wpe.weight": "position_embd.weight", "ln_f.weight": "output_norm.weight",
    "ln_f.bias": "output_norm.bias",
}  # fmt: skip
_LAYER = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}


def export_gguf(source: Source, target: Path, dtype: str, force: bool) -> dict[str, int]:
    """Write the file `target`; its bytes by its name. InputError where it cannot be; nothing is left then."""
    gguf = _library()
    check_file(target, force)
    words = vocabulary(source.tokenizer)
    weights = list(_tensors(source, dtype))

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(path, "gpt2")
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
            kinds = {"float32": gguf.GGMLQuantizationType.F32, "float16": gguf.GGMLQuantizationType.F16,
                     "uint16": gguf.GGMLQuantizationType.BF16}  # fmt: skip
            raw = [(name, values.view(np.uint8), kinds[values.dtype.name]) for name, values in weights]
            for name, bytes_, kind in raw:
                writer.add_tensor_info(name, bytes_.shape, bytes_.dtype, bytes_.nbytes, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, bytes_, _ in raw:
                writer.write_tensor_data(bytes_)
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
    shape = source.shape
    writer.add_name(name)
    writer.add_context_length(shape.block_size)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ff_width)
    writer.add_head_count(shape.heads)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])


def _tensors(source: Source, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """llama.cpp's names, and C-contiguous arrays of at least one dimension."""
    for name, values in with_biases(source).items():
        theirs = _TOP.get(name) or _layer_name(name)
        if values.ndim == 2 and name.startswith("h."):
            values = np.ascontiguousarray(values.T)
        stored = narrow(name, values, dtype if values.ndim == 2 and name != "wpe.weight" else "f32")
        yield theirs, stored
        if name == "wte.weight":
            yield "output.weight", stored


def _layer_name(name: str) -> str:
    _, layer, rest = name.split(".", 2)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_LAYER[module]}.{kind}"
