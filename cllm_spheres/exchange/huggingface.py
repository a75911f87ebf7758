"""A checkpoint of a run -> a folder that transformers loads, with tokenizer and model card."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cllm_spheres.checkpoint import tensors
from cllm_spheres.exchange.card import model_card
from cllm_spheres.exchange.narrow import SAFETENSORS, TORCH, narrow
from cllm_spheres.exchange.source import Source
from cllm_spheres.exchange.target import check_folder, write_folder
from cllm_spheres.exchange.tokenizer_out import tokenizer_config, tokenizer_json
from cllm_spheres.model.description import Tensor
from cllm_spheres.model.families import family_of
from cllm_spheres.model.layout import Layout

NAMES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "README.md",
)  # fmt: skip


def export_huggingface(source: Source, target: Path, dtype: str, force: bool) -> dict[str, int]:
    """Write the folder `target`; the bytes of each file. InputError where it cannot be; nothing is left then."""
    check_folder(target, NAMES, force)
    eot = source.tokenizer.eot
    dropout = source.checkpoint.config.get("resid_pdrop", 0.0) if source.checkpoint else 0.0
    files = family_of(source.shape).files
    config = files.config(files.stored(source.shape), eot, dropout)
    config |= {"pad_token_id": eot, "dtype": TORCH[dtype], "torch_dtype": TORCH[dtype]}
    weights = {t.huggingface: narrow(t.name, values, dtype) for t, values in stored_tensors(source)}
    file = tensors.File(weights, SAFETENSORS)
    texts: dict[str, Iterable[memoryview]] = {
        "config.json": _json(config),
        "generation_config.json": _json({"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}),
        "tokenizer.json": _json(tokenizer_json(source.tokenizer)),
        "tokenizer_config.json": _json(tokenizer_config(source.tokenizer, source.shape.block_size)),
        "README.md": [memoryview(model_card(source, target.name, dtype).encode())],
    }
    return write_folder(target, texts | {"model.safetensors": file.chunks()})


def stored_tensors(source: Source) -> list[tuple[Tensor, np.ndarray]]:
    """All tensors that a file of the family has, float32, in the order of our buffers.

    One that the model lacks, such as a bias, has its first value: it gives the same logits.
    """
    weights = dict(source.tensors())
    tensors = [placed.tensor for placed in Layout(family_of(source.shape).files.stored(source.shape)).tensors]
    return [(t, weights.get(t.name, np.full(t.shape, t.constant, np.float32))) for t in tensors]


def _json(record: dict[str, Any]) -> list[memoryview]:
    return [memoryview(json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n")]
