"""A prepared folder -> its tokens, memory-mapped, and what is known of them."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from cllm_spheres.errors import InputError, shown
from cllm_spheres.text import folder as folders
from cllm_spheres.text.tokenizer import KINDS, Tokenizer, load_tokenizer
from cllm_spheres.units import percent, plural

_PARTS = ("train", "val")
_COUNTS = ("documents", "bytes", "tokens")
_DTYPES = ("uint16", "uint32")
_VERIFY_TOKENS = 1 << 22  # looked at together
MIN_WARNED = 1000  # tokens: in less text a word more or less already changes the share


@dataclass(frozen=True, eq=False)
class Prepared:
    """A prepared folder. `train` and `val` are read-only ids, uint16 or uint32 [N], on disk."""

    folder: Path
    manifest: dict[str, Any]
    train: npt.NDArray[np.unsignedinteger]
    val: npt.NDArray[np.unsignedinteger]

    @classmethod
    def open(cls, folder: str | Path) -> Prepared:
        """Open a prepared folder; InputError where it is missing, damaged or cut short.

        Sizes and the manifest's own hash are checked here; `verify` checks every byte.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        for name, entry in manifest["files"].items():
            try:
                status = (folder / name).stat()
            except OSError as error:
                raise _damaged(folder, f"{name}: {error.strerror}") from None
            if not stat.S_ISREG(status.st_mode):
                raise _damaged(folder, f"{name} is not a file")
            if status.st_size != entry["bytes"]:
                raise _damaged(folder, f"{name} has {status.st_size:,} bytes instead of {entry['bytes']:,}")
        ids = []
        for part in _PARTS:
            array = _map(folder, f"{part}.bin", manifest["dtype"])
            if len(array) != manifest[part]["tokens"]:
                raise _damaged(folder, f"{part}.bin has {len(array):,} of {manifest[part]['tokens']:,} tokens")
            ids.append(array)
        return cls(folder, manifest, *ids)

    def verify(self) -> None:
        """InputError where any file differs from the manifest's sha256, or a token is not in the vocabulary."""
        for name, entry in self.manifest["files"].items():
            try:
                digest = folders.hash_file(self.folder / name)
            except OSError as error:
                raise _damaged(self.folder, f"{name}: {error.strerror}") from None
            if digest != entry["sha256"]:
                raise _damaged(self.folder, f"{name} has sha256 {digest[:12]} instead of {entry['sha256'][:12]}")
        for part, ids in (("train", self.train), ("val", self.val)):  # the kernels take every id for a row of a table
            for start in range(0, len(ids), _VERIFY_TOKENS):
                largest = int(ids[start : start + _VERIFY_TOKENS].max())
                if largest >= self.vocab_size:
                    raise _damaged(
                        self.folder, f"{part}.bin holds token {largest}, the vocabulary is {self.vocab_size}"
                    )

    @property
    def vocab_size(self) -> int:
        """Number of token ids, end of text included."""
        return self.manifest["vocab_size"]

    @property
    def eot(self) -> int:
        """The end-of-text token that stands between documents."""
        return self.manifest["eot"]

    @property
    def val_share(self) -> float:
        """Which share of the tokens the validation part really has."""
        return len(self.val) / max(1, len(self.train) + len(self.val))

    def share_text(self) -> str:
        """The real share of the validation part and the one that was asked for, in words."""
        cut = self.manifest.get("cut", 0)
        both = f"; {plural(cut, 'document')} cut, in both parts" if cut else ""
        asked = self.manifest["val_fraction"]
        return f"{percent(self.val_share)} of the tokens ({percent(asked)} of the text asked for){both}"

    def share_warning(self) -> str:
        """A sentence where that is not the share that was asked for, by more than a tenth of it; else ""."""
        asked = self.manifest["val_fraction"]
        if self.manifest["tokens"] < MIN_WARNED or abs(self.val_share - asked) <= 0.1 * asked:
            return ""
        cure = "No other division of its documents comes closer."
        if self.manifest["version"] < folders.VERSION:
            cure = "It was prepared by an older version, which never cut a document: prepare the text again."
        return (
            f"{percent(self.val_share)} of the tokens are for validation, and {percent(asked)} were asked for. {cure}"
        )

    def report(self) -> Iterator[dict[str, Any]]:
        """What became of each file: the records of `cllm_spheres.text.report`. InputError where there are none."""
        entry = self.manifest.get("report")
        if entry is None:
            raise InputError(
                f"{self.folder} was prepared by an older version, which kept no report on its files. Prepare the text"
                " again to have one."
            )
        path = self.folder / folders.REPORT
        try:
            if not path.is_file() or folders.entry_of(path) != entry:
                raise _damaged(self.folder, f"{folders.REPORT} is not what was written")
            with path.open(encoding="utf-8") as file:
                yield from map(json.loads, file)
        except OSError as error:
            raise _damaged(self.folder, f"{folders.REPORT}: {error.strerror}") from None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; InputError where its file does not fit the manifest."""
        return self._read_tokenizer()

    def _read_tokenizer(self) -> Tokenizer:
        tokenizer = load_tokenizer(self.folder / "tokenizer.json")
        found = tokenizer.kind, tokenizer.vocab_size, tokenizer.eot
        if found != (self.manifest["tokenizer"], self.vocab_size, self.eot):
            raise _damaged(
                self.folder,
                f"tokenizer.json is {tokenizer.kind} with {tokenizer.vocab_size} tokens, {tokenizer.eot} ends a text; "
                f"the manifest says {self.manifest['tokenizer']} with {self.vocab_size} and {self.eot}",
            )
        return tokenizer

    @cached_property
    def token_bytes(self) -> npt.NDArray[np.int32] | None:
        """Bytes of text per token, int32 [V], 0 for end of text; None for word."""
        return self._read_tokenizer().token_bytes()  # not kept: 50,304 tokens take 50 MB

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 that names these data: equal if and only if tokens, tokenizer and dtype are."""
        hashes = {name: entry["sha256"] for name, entry in self.manifest["files"].items()}
        return hashlib.sha256(json.dumps([self.manifest["dtype"], hashes], sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        is_folder = stat.S_ISDIR(os.stat(folder).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"There is no prepared folder {folder}. Make it with: cllm-spheres prepare PATH --out {folder}"
        ) from None
    except OSError as error:
        raise InputError(f"Cannot read {folder}: {error.strerror}.") from None
    if not is_folder:
        raise InputError(f"{folder} is not a folder. Prepare it with: cllm-spheres prepare {folder} --out DIR")
    try:
        manifest = json.loads(folders.read_regular(folder / "manifest.json", folders.MANIFEST_BYTES))
    except FileNotFoundError:
        raise InputError(
            f"{folder} is not a prepared folder: it has no manifest.json. "
            f"Prepare it with: cllm-spheres prepare {folder} --out DIR"
        ) from None
    except OSError as error:
        raise InputError(f"Cannot read {folder / 'manifest.json'}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, f"manifest.json is no JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != folders.FORMAT:
        raise InputError(f"{folder} is not a prepared folder: its manifest.json is of something else.")
    if manifest.get("version") not in folders.READABLE:
        raise InputError(
            f"{folder} has version {shown(manifest.get('version'))} of the format, this program reads "
            f"{' and '.join(map(str, folders.READABLE))}. Prepare the text anew."
        )
    if manifest.get("manifest_sha256") != folders.manifest_hash(manifest):
        raise _damaged(folder, "manifest.json was changed after it was written")
    if wrong := next(_wrong_entries(manifest), None):
        raise _damaged(folder, f"manifest.json has {wrong} {shown(manifest.get(wrong))}")
    return manifest


def _wrong_entries(manifest: dict[str, Any]) -> Iterator[str]:
    """The entries that are missing or of another kind than what `prepare` writes: a true hash says nothing of them."""
    vocab_size, files, skipped = manifest.get("vocab_size"), manifest.get("files"), manifest.get("skipped")
    if not _is_count(vocab_size) or not 1 <= vocab_size <= 2**31:
        yield "vocab_size"
    elif not _is_count(manifest.get("eot")) or manifest["eot"] >= vocab_size:
        yield "eot"
    for name, known in (("tokenizer", KINDS), ("dtype", _DTYPES)):
        if manifest.get(name) not in known:
            yield name
    for part in _PARTS:
        counts = manifest.get(part)
        if not isinstance(counts, dict) or not all(_is_count(counts.get(name)) for name in _COUNTS):
            yield part
    yield from (name for name in _COUNTS if not _is_count(manifest.get(name)))
    if manifest["version"] == folders.VERSION:
        if not _is_count(manifest.get("cut")):
            yield "cut"
        if not _is_entry(manifest.get("report")):
            yield "report"
        left_out = manifest.get("left_out")
        if not isinstance(left_out, list) or not all(map(_is_left_out, left_out)):
            yield "left_out"
    for name in ("bytes_per_token", "val_fraction"):
        if type(manifest.get(name)) not in (int, float):
            yield name
    for name in ("notes", "sources"):
        words = manifest.get(name)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            yield name
    if not isinstance(skipped, dict) or not all(map(_is_count, skipped.values())):
        yield "skipped"
    if not isinstance(files, dict) or files.keys() != set(folders.FILES) or not all(map(_is_entry, files.values())):
        yield "files"


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and _is_count(entry.get("bytes")) and isinstance(entry.get("sha256"), str)


def _is_left_out(entry: Any) -> bool:
    """Whether this is an entry of `left_out`: see `cllm_spheres.text.report`."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("reason"), str)
        and all(_is_count(entry.get(name)) for name in ("count", "files", "bytes"))
        and isinstance(entry.get("first"), list)
        and all(isinstance(name, str) for name in entry["first"])
    )


def _map(folder: Path, name: str, dtype: str) -> npt.NDArray[np.unsignedinteger]:
    path, kind = folder / name, np.dtype(dtype).newbyteorder("<")
    size = path.stat().st_size
    if size == 0:
        return np.zeros(0, kind)
    if size % kind.itemsize:
        raise _damaged(folder, f"{name} has {size:,} bytes, not a multiple of the {kind.itemsize} of a token")
    try:
        return np.memmap(path, kind, "r")
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from None


def _damaged(folder: Path, what: str) -> InputError:
    return InputError(f"The prepared folder {folder} is damaged: {what}. Prepare the text anew.")
