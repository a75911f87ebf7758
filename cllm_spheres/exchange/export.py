"""A run -> its model in another tool's form: which targets there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cllm_spheres.checkpoint.store import Which
from cllm_spheres.errors import InputError, nearest
from cllm_spheres.exchange.gguf_file import export_gguf
from cllm_spheres.exchange.huggingface import export_huggingface
from cllm_spheres.exchange.narrow import DTYPES, check_dtype
from cllm_spheres.exchange.quantise import QUANTISED, kept_in_f16
from cllm_spheres.exchange.source import Source, open_source

TARGETS: dict[str, Callable[[Source, Path, str, bool], dict[str, int]]] = {
    "hf": export_huggingface,
    "gguf": export_gguf,
}
TARGET_DTYPES = {"hf": DTYPES, "gguf": (*DTYPES, *QUANTISED)}


@dataclass(frozen=True)
class Exported:
    """What was written: from which model, and the bytes of each file; sentences on what is not of the dtype."""

    source: Source
    files: dict[str, int]
    notes: tuple[str, ...]


def export(
    run: Path, to: str, target: Path, *, dtype: str = "f32", which: Which = None, force: bool = False
) -> Exported:
    """Write the model of a run (or of one of its checkpoints) for another tool. InputError leaves nothing behind.

    to: "hf", `target` becomes a folder for Hugging Face's transformers; "gguf", a file for llama.cpp. dtype: of the
    weights, f32, f16 or bf16, with "gguf" also q8_0 or q4_0. which: the checkpoint, as in Store.find. force: replace an
    export that stands there.
    """
    if to not in TARGETS:
        raise InputError(f"There is no export target {to!r}: {nearest(to, TARGETS)}")
    check_dtype(dtype, TARGET_DTYPES[to], to)
    source = open_source(run, which)
    if source.checkpoint is None:
        raise InputError(f"{run} is a model folder already. Import it first: cllm-spheres import {run} RUN")
    try:
        return Exported(source, TARGETS[to](source, target, dtype, force), kept_in_f16(source.shape, dtype))
    except OSError as error:
        raise InputError(f"Cannot write {target}: {error.strerror}. Give another place.") from None
