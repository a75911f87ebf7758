"""Text -> its prepared folder in the cache, made only once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cllm_spheres import caches
from cllm_spheres.errors import InputError
from cllm_spheres.text import folder as folders
from cllm_spheres.text.files import FileList
from cllm_spheres.text.prepare import Progress, Settings, find, no_text, prepare_files
from cllm_spheres.text.prepared import Prepared


def prepare_cached(
    source_paths: Sequence[str | Path] | None,
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    val_fraction: float = 0.1,
    exact: bool = True,
    progress: Progress | None = None,
    given: bytes | None = None,
) -> Prepared:
    """The prepared form of some text, made only once: what `train PATH` calls.

    given: a tokenizer.json, instead of `tokenizer` and `vocab_size`.
    A prepared folder is opened as it is. Raw text (None: the embedded corpus) is prepared into the cache
    under a hash of its contents and the settings; a second key of paths, sizes and times saves reading it
    again. Several processes may do this at the same time. InputError for bad input and where the cache
    cannot be written.
    """
    if isinstance(source_paths, str | Path):
        source_paths = [source_paths]
    if source_paths is not None and len(source_paths) == 1 and folders.is_prepared(Path(source_paths[0])):
        return Prepared.open(source_paths[0])
    settings = Settings(tokenizer, vocab_size, val_fraction, exact, given)
    settings.check()
    files, sources = find(source_paths)
    if not files.paths:
        raise no_text(sources, files.skipped)
    cache = cache_folder()
    quick = cache / "keys" / _quick_key(files, settings)
    try:
        return Prepared.open(cache / quick.read_text())
    except (OSError, ValueError):  # InputError is a ValueError, as is text that cannot be decoded
        name = _content_key(files, settings, progress)
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
        raise InputError(_no_cache(f"{cache} cannot be made: {error.strerror}")) from None
    if not os.access(cache, os.W_OK | os.X_OK):
        raise InputError(_no_cache(f"there is no permission to write in {cache}"))
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
    """Where prepared text is kept: see `caches.folder`. InputError where nothing can be kept."""
    top = caches.folder()
    if top is None:
        raise InputError(_no_cache(caches.problem(caches.wanted())))
    return top / "prepared"


def _no_cache(why: str | None) -> str:
    return (
        f"Prepared text cannot be kept: {why}. Prepare it into a folder of your own with"
        " `cllm-spheres prepare PATH --out DIR` and train on DIR, or let XDG_CACHE_HOME name a folder that you may"
        " write to."
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
        *([] if settings.given is None else [settings.given.decode()]),
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


def _content_key(files: FileList, settings: Settings, progress: Progress | None) -> str:
    digest, done = _settings_hash(settings), 0
    for path, num_bytes in zip(files.paths, files.sizes, strict=True):
        if progress:
            progress("look", done, files.total_bytes)
        try:
            digest.update(folders.hash_file(Path(path)).encode())
        except OSError as error:
            digest.update(f"unreadable {error.errno}".encode())
        done += num_bytes
    if progress:
        progress("look", done, files.total_bytes)
    return digest.hexdigest()[:32]
