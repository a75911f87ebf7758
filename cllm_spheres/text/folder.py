"""A folder that appears whole or not at all: built under a hidden name beside its place, then renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cllm_spheres.errors import InputError

FORMAT = "cllm-spheres prepared text"
VERSION = 2
READABLE = (1, VERSION)  # 1: documents were never cut, and there was no report
FILES = ("train.bin", "val.bin", "tokenizer.json")
REPORT = (
    "files.jsonl"  # what became of each file: no part of the data, so that the same text elsewhere is the same data
)
_LOCK = "lock"
MANIFEST_BYTES = 16 << 20  # a real one has about 1,500 and the names of the sources
STALE_S = 600  # a building folder that nobody holds is left by a killed process; young ones may not be locked yet


def is_prepared(folder: Path) -> bool:
    """Whether a folder calls itself a prepared folder; it may still be damaged."""
    try:
        return json.loads(read_regular(folder / "manifest.json", MANIFEST_BYTES)).get("format") == FORMAT
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def check_target(target: Path) -> None:
    """InputError where something stands at `target` that must not be replaced."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise InputError(f"{target} is not a folder. Name another --out.")
    try:
        empty = not any(target.iterdir())
    except OSError as error:
        raise InputError(f"Cannot read {target}: {error.strerror}. Name another --out.") from None
    if not empty and not is_prepared(target):
        raise InputError(f"{target} exists and is not a prepared folder. Name another --out, or remove it.")


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """A new folder beside `target` to write into, removed at the end unless `publish` moved it.

    InputError where it cannot be made. Folders above `target` are made, and removed again if nothing comes
    of it.
    """
    target = Path(os.path.realpath(target))
    made = [parent for parent in target.parents if not os.path.lexists(parent)]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        temporary = target.parent / f".{target.name}.preparing-{secrets.token_hex(4)}"
        temporary.mkdir()
        lock = (temporary / _LOCK).open("w")
    except OSError as error:
        _remove_empty(made)
        raise InputError(f"Cannot write {target}: {error.strerror}. Name another --out.") from None
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temporary
    finally:
        lock.close()
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(made)


def publish(temporary: Path, target: Path, *, keep_existing: bool = False) -> None:
    """Sync a finished folder to disk and give it its name, in the place of what stands there.

    With `keep_existing` a folder that another process put there meanwhile stays, and ours is dropped.
    """
    target = Path(os.path.realpath(target))
    (temporary / _LOCK).unlink()
    for path in [*temporary.iterdir(), temporary]:
        _sync(path)
    check_target(target)
    for attempt in range(3):
        old = None
        if target.exists():
            if keep_existing:
                return
            old = target.parent / f".{target.name}.preparing-old-{secrets.token_hex(4)}"
            with contextlib.suppress(FileNotFoundError):
                os.rename(target, old)
        try:
            os.rename(temporary, target)
        except OSError:
            if old is not None and not target.exists():
                os.rename(old, target)
            if attempt == 2:
                raise
            continue
        finally:
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)
        break
    _sync(target.parent)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """manifest.json; its last entry is the sha256 of all that stands before it."""
    (folder / "manifest.json").write_text(
        json.dumps(manifest | {"manifest_sha256": manifest_hash(manifest)}, indent=1) + "\n", encoding="utf-8"
    )


def manifest_hash(manifest: dict[str, Any]) -> str:
    """The sha256 of a manifest without its own hash."""
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_regular(path: Path, most: int | None = None) -> bytes:
    """A whole file. OSError also where it is a pipe or a device, which may never end, or has more than `most` bytes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not wait for its writer
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a file", str(path))
        if most is not None and status.st_size > most:
            raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, at most {most:,} were expected", str(path))
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """The sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry_of(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """What a manifest says of a file; its hash may be known already."""
    return {"bytes": path.stat().st_size, "sha256": sha256 or hash_file(path)}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:  # the deepest first
        with contextlib.suppress(OSError):
            folder.rmdir()


def _remove_stale(target: Path) -> None:
    """Remove what a killed process left behind under this target's name."""
    for path in target.parent.glob(f".{target.name}.preparing-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime < STALE_S:
                continue
            if (path / _LOCK).exists():
                with (path / _LOCK).open() as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
