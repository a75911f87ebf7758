"""A prepared folder -> its tokens, memory-mapped; and text -> a prepared folder in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cllm_spheres.errors import InputError
from cllm_spheres.text import folder as folders
from cllm_spheres.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from cllm_spheres.text.files import FileList
    from cllm_spheres.text.prepare import Settings

_PARTS = ("train", "val")
_KEYS = {
    "version",
    "tokenizer",
    "vocab_size",
    "eot",
    "dtype",
    "train",
    "val",
    "files",
    "skipped",
    "manifest_sha256",
}


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
                size = (folder / name).stat().st_size
            except OSError as error:
                raise _damaged(folder, f"{name}: {error.strerror}") from None
            if size != entry["bytes"]:
                raise _damaged(folder, f"{name} has {size:,} bytes instead of {entry['bytes']:,}")
        ids = []
        for part in _PARTS:
            array = _map(folder / f"{part}.bin", manifest["dtype"])
            if len(array) != manifest[part]["tokens"]:
                raise _damaged(folder, f"{part}.bin has {len(array):,} of {manifest[part]['tokens']:,} tokens")
            ids.append(array)
        return cls(folder, manifest, *ids)

    def verify(self) -> None:
        """InputError where any file differs from the manifest's sha256."""
        for name, entry in self.manifest["files"].items():
            try:
                digest = folders.hash_file(self.folder / name)
            except OSError as error:
                raise _damaged(self.folder, f"{name}: {error.strerror}") from None
            if digest != entry["sha256"]:
                raise _damaged(self.folder, f"{name} has sha256 {digest[:12]} instead of {entry['sha256'][:12]}")

    @property
    def vocab_size(self) -> int:
        """Number of token ids, end of text included."""
        return self.manifest["vocab_size"]

    @property
    def eot(self) -> int:
        """The end-of-text token that stands between documents."""
        return self.manifest["eot"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; InputError where its file does not fit the manifest."""
        tokenizer = load_tokenizer(self.folder / "tokenizer.json")
        if (tokenizer.kind, tokenizer.vocab_size) != (self.manifest["tokenizer"], self.vocab_size):
            raise _damaged(
                self.folder,
                f"tokenizer.json is {tokenizer.kind} with {tokenizer.vocab_size} tokens, the manifest says "
                f"{self.manifest['tokenizer']} with {self.vocab_size}",
            )
        return tokenizer

    @cached_property
    def token_bytes(self) -> npt.NDArray[np.int32] | None:
        """Bytes of text per token, int32 [V], 0 for end of text; None for word."""
        return self.tokenizer.token_bytes()

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 that names these data: equal if and only if tokens, tokenizer and dtype are."""
        hashes = {name: entry["sha256"] for name, entry in self.manifest["files"].items()}
        return hashlib.sha256(json.dumps([self.manifest["dtype"], hashes], sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise InputError(
            f"There is no prepared folder {folder}. Make it with: cllm-spheres prepare PATH --out {folder}"
        )
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder. Prepare it with: cllm-spheres prepare {folder} --out DIR")
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{folder} is not a prepared folder: it has no manifest.json. "
            f"Prepare it with: cllm-spheres prepare {folder} --out DIR"
        ) from None
    except OSError as error:
        raise InputError(f"Cannot read {folder / 'manifest.json'}: {error.strerror}.") from None
    except ValueError as error:
        raise _damaged(folder, f"manifest.json is no JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != folders.FORMAT:
        raise InputError(f"{folder} is not a prepared folder: its manifest.json is of something else.")
    if manifest.get("version") != folders.VERSION:
        raise InputError(
            f"{folder} has version {manifest.get('version')} of the format, this program reads "
            f"{folders.VERSION}. Prepare the text anew."
        )
    if not manifest.keys() >= _KEYS or manifest["manifest_sha256"] != folders.manifest_hash(manifest):
        raise _damaged(folder, "manifest.json was changed after it was written")
    return manifest


def _map(path: Path, dtype: str) -> npt.NDArray[np.unsignedinteger]:
    kind = np.dtype(dtype).newbyteorder("<")
    if path.stat().st_size == 0:
        return np.zeros(0, kind)
    try:
        return np.memmap(path, kind, "r")
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from None


def _damaged(folder: Path, what: str) -> InputError:
    return InputError(f"The prepared folder {folder} is damaged: {what}. Prepare the text anew.")


def prepare_cached(
    source_paths: Sequence[str | Path] | None,
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    val_fraction: float = 0.1,
    exact: bool = True,
    progress: Callable[[str, float, float], None] | None = None,
) -> Prepared:
    """The prepared form of some text, made only once: what `train PATH` calls.

    A prepared folder is opened as it is. Raw text (None: the embedded corpus) is prepared into the cache
    under a hash of its contents and the settings; a second key of paths, sizes and times saves reading it
    again. Several processes may do this at the same time. InputError for bad input and where the cache
    cannot be written.
    """
    from cllm_spheres.text.embedded import embedded_files, embedded_name
    from cllm_spheres.text.files import list_files
    from cllm_spheres.text.prepare import Settings, no_text, prepare_files

    if isinstance(source_paths, str | Path):
        source_paths = [source_paths]
    if source_paths is not None and len(source_paths) == 1 and folders.is_prepared(Path(source_paths[0])):
        return Prepared.open(source_paths[0])
    settings = Settings(tokenizer, vocab_size, val_fraction, exact)
    settings.check()
    files = embedded_files() if source_paths is None else list_files(source_paths)
    sources = [embedded_name()] if source_paths is None else list(map(str, source_paths))
    if not files.paths:
        raise no_text(sources, files.skipped)
    cache = cache_folder()
    quick = cache / "keys" / _quick_key(files, settings)
    try:
        return Prepared.open(cache / quick.read_text())
    except (OSError, InputError):
        name = _content_key(files, settings)
    target = cache / name
    if target.exists():
        try:
            prepared = Prepared.open(target)
            _remember(quick, name)
            return prepared
        except InputError:
            shutil.rmtree(target, ignore_errors=True)  # damaged: it is made anew
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(_no_cache(cache, error.strerror)) from None
    if not os.access(cache, os.W_OK | os.X_OK):
        raise InputError(_no_cache(cache, "Permission denied"))
    prepared = prepare_files(files, sources, target, settings, progress=progress, keep_existing=True)
    _remember(quick, name)
    return prepared


def _remember(quick: Path, name: str) -> None:
    """Note which cache entry these paths, sizes and times belong to; it only saves time."""
    with contextlib.suppress(OSError):
        quick.parent.mkdir(exist_ok=True)
        temporary = quick.with_name(f"{quick.name}.{os.getpid()}")
        temporary.write_text(name)
        temporary.replace(quick)


def cache_folder() -> Path:
    """Where prepared text is kept, below $XDG_CACHE_HOME or ~/.cache. Safe to delete."""
    top = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(top) / "cllm-spheres" / "prepared"


def _no_cache(cache: Path, why: str | None) -> str:
    return (
        f"Cannot write the cache {cache}: {why}. Prepare into a folder of your own with "
        "`cllm-spheres prepare PATH --out DIR` and train on DIR, or set XDG_CACHE_HOME."
    )


def _settings_hash(settings: Settings) -> Any:
    """A hash that has seen everything but the text that decides the prepared bytes."""
    import tokenizers

    parts = [
        folders.VERSION,
        settings.tokenizer,
        settings.vocab_size,
        settings.exact,
        settings.val_fraction,
        tokenizers.__version__,
    ]
    return hashlib.sha256(json.dumps(parts).encode())


def _quick_key(files: FileList, settings: Settings) -> str:
    digest = _settings_hash(settings)
    for path in files.paths:
        try:
            status = os.stat(path)
        except OSError:
            continue  # it vanished
        record = [
            os.path.abspath(path),
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            status.st_ino,
        ]
        digest.update(json.dumps(record).encode())
    return digest.hexdigest()[:32]


def _content_key(files: FileList, settings: Settings) -> str:
    digest = _settings_hash(settings)
    for path in files.paths:
        try:
            digest.update(folders.hash_file(Path(path)).encode())
        except OSError as error:
            digest.update(f"unreadable {error.errno}".encode())
    return digest.hexdigest()[:32]
