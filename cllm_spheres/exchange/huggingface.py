"""A checkpoint of a run -> a folder that transformers loads as a GPT-2, with tokenizer and model card."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cllm_spheres.checkpoint import tensors
from cllm_spheres.exchange.card import model_card
from cllm_spheres.exchange.gpt2 import huggingface_config
from cllm_spheres.exchange.narrow import SAFETENSORS, TORCH, narrow
from cllm_spheres.exchange.source import Source
from cllm_spheres.exchange.target import check_folder, write_folder
from cllm_spheres.exchange.tokenizer_out import tokenizer_config, tokenizer_json
from cllm_spheres.model.layout import tensor_shapes
from cllm_spheres.model.shape import Shape

NAMES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "README.md",
)  # fmt: skip


def export_huggingface(source: Source, target: Path, dtype: str, force: bool) -> dict[str, int]:
    """Write the folder `target`; the bytes of each file. InputError where it cannot be; nothing is left then."""
    check_folder(target, NAMES, force)
    eot = source.tokenizer.eot
    dropout = source.checkpoint.config.get("resid_pdrop", 0.0) if source.checkpoint else 0.0
    config = huggingface_config(source.shape, eot, dropout)
    del config["bias"]  # there are biases always
    config |= {"pad_token_id": eot, "dtype": TORCH[dtype], "torch_dtype": TORCH[dtype]}
    weights = {f"transformer.{name}": narrow(name, values, dtype) for name, values in with_biases(source).items()}
    file = tensors.File(weights, SAFETENSORS)
    texts: dict[str, Iterable[memoryview]] = {
        "config.json": _json(config),
        "generation_config.json": _json({"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}),
        "tokenizer.json": _json(tokenizer_json(source.tokenizer)),
        "tokenizer_config.json": _json(tokenizer_config(source.tokenizer, source.shape.block_size)),
        "README.md": [memoryview(model_card(source, target.name, dtype).encode())],
    }
    return write_folder(target, texts | {"model.safetensors": file.chunks()})


def with_biases(source: Source) -> dict[str, np.ndarray]:
    """All tensors of a GPT-2, float32; a model without biases gets zeros, which give the same logits."""
    weights = dict(source.tensors())
    return {name: weights.get(name, np.zeros(dims, np.float32)) for name, dims in all_shapes(source.shape).items()}


def all_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a GPT-2's tensors, biases included."""
    matrices, vectors = tensor_shapes(replace(shape, bias=True))
    return matrices | vectors


def _json(record: dict[str, Any]) -> list[memoryview]:
    return [memoryview(json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n")]
