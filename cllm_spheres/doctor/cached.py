"""The folders of `caches.places` -> what lies in them: compiled kernels and prepared text; and how it is removed.

Only what this program has put there by its own names is looked at and removed, and no link is followed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from cllm_spheres import caches
from cllm_spheres.text.folder import STALE_S, is_prepared
from cllm_spheres.text.prepared import Prepared

_KERNELS = re.compile(r"[0-9a-f]{16}")
_PREPARED = re.compile(r"[0-9a-f]{32}")
_UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.preparing-.+|\.removed-.+")
_ASIDE = ".removed-"  # what is being removed has this name: nobody finds it any more


@dataclass(frozen=True)
class Cached:
    """One thing in a cache."""

    path: str
    kind: (
        str  # kernels, text, unfinished (left by a process that was killed), or keys (which text was prepared already)
    )
    about: str  # of text: what it is
    size_bytes: int
    changed: float  # Unix time: of kernels, when the last was compiled
    in_use: bool


def contents() -> list[Cached]:
    """All that lies there, kernels first, the oldest of each kind first."""
    used = _mapped()
    found = [cached for place in caches.places() for cached in _of_place(place, used)]
    kinds = ("kernels", "text", "unfinished", "keys")
    return sorted(found, key=lambda cached: (kinds.index(cached.kind), cached.changed, cached.path))


def clear() -> tuple[list[Cached], list[Cached]]:
    """Remove what nobody uses: what was removed, and what is left because it is used or cannot be removed."""
    removed: list[Cached] = []
    left: list[Cached] = []
    for cached in contents():
        (removed if not cached.in_use and _remove(Path(cached.path)) else left).append(cached)
    return removed, left


def _of_place(place: Path, used: str) -> Iterator[Cached]:
    for folder, pattern, kind in (("kernels", _KERNELS, "kernels"), ("prepared", _PREPARED, "text")):
        if (place / folder).is_symlink():
            continue  # it lies elsewhere, and may be somebody else's
        for entry in _entries(place / folder):
            if entry.is_symlink() or not entry.is_dir():
                continue
            if pattern.fullmatch(entry.name):
                yield _look(entry, kind, caches.is_used(entry) or f" {entry.resolve()}{os.sep}" in used)
            elif _UNFINISHED.fullmatch(entry.name):
                yield _look(entry, "unfinished", _is_being_made(entry))
    keys = place / "prepared" / "keys"
    if keys.is_dir() and not keys.is_symlink() and not (place / "prepared").is_symlink():
        yield _look(keys, "keys", False)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _look(path: Path, kind: str, in_use: bool) -> Cached:
    total, changed = 0, 0.0
    for place, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):  # it has just been removed
                status = os.lstat(os.path.join(place, name))
                total, changed = total + status.st_size, max(changed, status.st_mtime)
    with contextlib.suppress(OSError):
        changed = changed or path.stat().st_mtime
    cached = Cached(str(path), kind, "", total, changed, in_use)
    if kind == "text" and is_prepared(path):
        with contextlib.suppress(ValueError):  # InputError is one: it is damaged
            manifest = Prepared.open(path).manifest
            cached = replace(cached, about=f"{manifest['tokenizer']}, {', '.join(manifest['sources'])}")
    return cached


def _is_being_made(folder: Path) -> bool:
    """Whether a process still prepares text in a folder, as `text.folder.building` makes it."""
    with contextlib.suppress(OSError):
        if time.time() - folder.stat().st_mtime < STALE_S:
            return True
        with (folder / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    with contextlib.suppress(OSError):
        return (folder / "lock").exists()  # it is held, or cannot be asked
    return False


def _mapped() -> str:
    """The files that the processes of this user have mapped: tokens of a training are."""
    maps = []
    for process in psutil.pids():
        with contextlib.suppress(OSError):  # another user's, or it has ended
            maps.append(Path(f"/proc/{process}/maps").read_text(encoding="utf-8", errors="surrogateescape"))
    return "\n".join(maps)


def _remove(path: Path) -> bool:
    """A folder, aside first, so that nobody finds half of it; whether it is gone."""
    aside = path.with_name(f"{_ASIDE}{secrets.token_hex(4)}")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False  # somebody has begun to use it
        if f" {path.resolve()}{os.sep}" in _mapped():
            return False  # a training has opened this text since `contents` looked
        path.rename(aside)
        shutil.rmtree(aside)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
