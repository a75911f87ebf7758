"""A folder of weights as Hugging Face keeps them -> the tensors of a shape, by our names, checked by name.

The weights lie in model.safetensors, or in the files that model.safetensors.index.json names. Names may lack the
family's prefix; buffers of older files, such as masks, are no weights and are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cllm_spheres.errors import InputError, shown
from cllm_spheres.exchange.safetensors_file import FLOATS, Entry, read_header
from cllm_spheres.model.families import described, family_of, tensors_of
from cllm_spheres.model.shape import Shape
from cllm_spheres.text.folder import read_regular

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
INDEX_BYTES = 16 << 20  # a real one has about 100 bytes a tensor
MOST_NAMES = 5  # in one message
HEAD = "lm_head.weight"  # the output matrix, which may be there beside the embedding that it is


class Weights:
    """The weights of a folder. `files` are those they lie in."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        """Reads the headers. InputError where there are no weights, or a header is damaged."""
        self.folder, self.shape = folder, shape
        self.files = _files(folder)
        self._entries: dict[str, Entry] = {}  # by our names, where these are known
        files = family_of(shape).files
        ours = {tensor.huggingface.removeprefix(files.prefix): tensor.name for tensor in tensors_of(shape)}
        for file in self.files:
            for name, entry in read_header(file).items():
                plain = name.removeprefix(files.prefix)
                if re.fullmatch(files.buffers, plain):
                    continue
                plain = ours.get(plain, plain)
                if plain in self._entries:
                    raise InputError(f"{folder} has two tensors {shown(plain)}, one of them in {file.name}.")
                self._entries[plain] = entry

    def check(self) -> None:
        """InputError names tensors that are missing, too many, of another shape, or no floats."""
        expected = {tensor.name: tensor.shape for tensor in tensors_of(self.shape)}
        head = described(self.shape).output.weight
        has_head = HEAD in self._entries
        if has_head:
            expected[HEAD] = expected[head]
        missing = [name for name in expected if name not in self._entries]
        extra = [name for name in self._entries if name not in expected]
        wrong = []
        if missing:
            wrong.append(f"{len(missing)} of {len(expected)} tensors are missing: {_names(missing)}")
        if extra:
            kind = f"a {family_of(self.shape).title} with {self.shape.layers} layers"
            wrong.append(f"{len(extra)} are not of {kind}: {_names(extra)}")
        for name, dims in expected.items():
            entry = self._entries.get(name)
            if entry is not None and entry.shape != dims:
                wrong.append(f"{name} has shape {list(entry.shape)} and not {list(dims)}")
            elif entry is not None and entry.dtype not in FLOATS:
                wrong.append(f"{name} is {entry.dtype}; weights can be {', '.join(FLOATS)}")
        if wrong:
            rest = f"; and {len(wrong) - MOST_NAMES} more" if len(wrong) > MOST_NAMES else ""
            raise InputError(
                f"The weights in {self.folder} are not those of its config.json: {'; '.join(wrong[:MOST_NAMES])}{rest}."
            )
        if has_head and not np.array_equal(self._entries[HEAD].read(), self._entries[head].read()):
            raise InputError(
                f"{HEAD} in {self.folder} is not {head}: the output matrix has weights of its own, and here both"
                " are one. Such a model cannot be imported."
            )

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and float32 array, one at a time, after `check`. InputError for a value that is not finite."""
        for name, entry in self._entries.items():
            if name != HEAD:
                values = entry.read()
                if not np.isfinite(values).all():
                    raise InputError(f"{name} in {entry.file} holds NaN or infinity: this model is broken.")
                yield name, values


def _names(names: list[str]) -> str:
    rest = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(map(shown, names[:MOST_NAMES])) + rest


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.exists():
        pickled = next(iter(sorted(folder.glob("pytorch_model*.bin"))), None)
        if pickled is not None:
            raise InputError(
                f"{folder} has {pickled.name}, which can run any code when it is read, and no {WEIGHTS}."
                " Convert it with transformers: from_pretrained, then save_pretrained."
            )
        raise InputError(f"{folder} has neither {WEIGHTS} nor {INDEX}.")
    try:
        record = json.loads(read_regular(index, INDEX_BYTES))
        names = record["weight_map"].values()
        files = sorted(set(names))
        if not files or not all(
            isinstance(name, str) and 0 < len(name) < 256 and Path(name).name == name for name in files
        ):
            raise ValueError(f"it names {shown(files)}")
    except OSError as error:
        raise InputError(f"Cannot read {index}: {error.strerror}.") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{index} is damaged: its weight_map names no files beside it ({shown(str(error))})."
        ) from None
    return [folder / name for name in files]
