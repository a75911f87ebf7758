"""A run, one of its checkpoints, or a Hugging Face folder -> a model to begin from: shape, tokenizer, weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cllm_spheres.checkpoint.checkpoint import MODEL, STATE, TOKENIZER, Checkpoint
from cllm_spheres.checkpoint.files import MANIFEST, read_manifest
from cllm_spheres.checkpoint.saved_model import model_of
from cllm_spheres.checkpoint.store import Store, Which
from cllm_spheres.errors import InputError, nearest, shown
from cllm_spheres.exchange.tokenizer_in import read_tokenizer
from cllm_spheres.exchange.weights import Weights
from cllm_spheres.model.families import FAMILIES, tensors_of
from cllm_spheres.model.shape import Shape
from cllm_spheres.text.folder import hash_file, read_regular
from cllm_spheres.text.tokenizer import Tokenizer, parse_tokenizer

CONFIG = "config.json"
CONFIG_BYTES = 1 << 20  # a real one has about 1,000


@dataclass(frozen=True, eq=False)
class Source:
    """A model that is checked and not yet read."""

    path: Path  # absolute: a Hugging Face folder, or a checkpoint of a run
    shape: Shape
    tokenizer_json: bytes
    tokenizer: Tokenizer
    fingerprint: str  # a sha256 of weights and tokenizer
    notes: tuple[str, ...]  # sentences on what was left out
    checkpoint: Checkpoint | None  # of one of our own runs
    _read: Callable[[], Iterator[tuple[str, np.ndarray]]]

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors of `shape`, float32, one at a time. InputError where one is not finite or has changed."""
        rows = {tensor.name: tensor.shape[0] for tensor in tensors_of(self.shape)}
        for name, values in self._read():
            yield name, values[: rows.get(name, len(values))]

    def check_finite(self) -> None:
        """InputError where a weight is NaN or infinite. All are read, in about the time that their hash has taken."""
        for _ in self.tensors():
            pass

    def cropped(self, block_size: int) -> Source:
        """The same model for shorter sequences: the first positions alone. InputError where it has fewer."""
        if block_size > self.shape.block_size:
            raise InputError(
                f"--block-size {block_size}: {self.path} has {self.shape.block_size} positions. Give"
                f" {self.shape.block_size} or less, or leave it out."
            )
        return replace(self, shape=replace(self.shape, block_size=block_size))


def open_source(path: Path, which: Which = None) -> Source:
    """The model of a folder, checked. which: of a run, the checkpoint: best if there is one, "last", or a step.

    InputError where it is neither, or no model of ours, or damaged.
    """
    try:
        if not path.is_dir():
            known = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
            hint = f" In {path.parent}: {nearest(path.name, known)}" if known else ""
            raise InputError(f"There is no run and no model folder {path}.{hint}")
        is_run, is_checkpoint = (
            (path / "checkpoints").is_dir(),
            (path / MANIFEST).is_file() and (path / STATE).is_file(),
        )
        is_model = (path / CONFIG).is_file()
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from None
    if is_run or (path / "config.toml").is_file():
        return _of_checkpoint(Store(path).load(which, optimizer=False))
    if is_checkpoint:
        return _of_checkpoint(Checkpoint(path.resolve(), optimizer=False))
    if is_model:
        return _of_folder(path)
    raise InputError(
        f"{path} is neither a run (it has no checkpoints) nor a model folder of Hugging Face (it has no {CONFIG})."
    )


def _of_checkpoint(saved: Checkpoint) -> Source:
    shape, tokenizer = model_of(saved)
    try:
        data = saved.tokenizer_path.read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read {saved.tokenizer_path}: {error.strerror}.") from None
    files = read_manifest(saved.path)["files"]
    hashes = [files[name]["sha256"] for name in (MODEL, TOKENIZER)]
    return Source(saved.path.resolve(), shape, data, tokenizer, _fingerprint(hashes), (), saved, lambda: _finite(saved))


def _finite(saved: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in saved.model_tensors():
        if not np.isfinite(tensor).all():
            raise InputError(f"{name} in {saved.path} holds NaN or infinity: take an earlier checkpoint.")
        yield name, tensor


def _of_folder(path: Path) -> Source:
    shape = _shape_of_config(_json(path / CONFIG), path / CONFIG)
    weights = Weights(path, shape)
    weights.check()
    data = read_tokenizer(path).encode()
    tokenizer = parse_tokenizer(data, str(path / TOKENIZER))
    notes: tuple[str, ...] = ()
    spare = shape.vocab_size - tokenizer.vocab_size
    if spare < 0:
        raise InputError(
            f"The tokenizer in {path} has {tokenizer.vocab_size:,} tokens, the model only {shape.vocab_size:,}:"
            " they do not belong together."
        )
    if spare:
        # No text has these ids and no id of them has a text: the logits of all others stay what they are.
        notes = (f"{spare:,} of the model's {shape.vocab_size:,} ids have no token and are left out.",)
        shape = replace(shape, vocab_size=tokenizer.vocab_size)
    try:
        hashes = [hash_file(file) for file in weights.files]
    except OSError as error:
        raise InputError(f"Cannot read the weights in {path}: {error.strerror}.") from None
    hashes.append(hashlib.sha256(data).hexdigest())
    return Source(path.resolve(), shape, data, tokenizer, _fingerprint(hashes), notes, None, weights.tensors)


def _shape_of_config(config: dict[str, Any], path: Path) -> Shape:
    for family in FAMILIES.values():
        if config.get("model_type") == family.files.model_type:
            return family.files.shape(config, str(path))
    known = " or ".join(repr(family.files.model_type) for family in FAMILIES.values())
    raise InputError(f"{path} is of model_type {shown(config.get('model_type'))}: only {known} can be imported.")


def _fingerprint(hashes: list[str]) -> str:
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(read_regular(path, CONFIG_BYTES))
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON: {shown(str(error))}.") from None
    if not isinstance(record, dict):
        raise InputError(f"{path} is no JSON object.")
    return record
