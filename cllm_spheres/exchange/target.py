"""Where an export goes: refused where something else stands there, and written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from cllm_spheres.checkpoint.disk import Disk, remove_tree
from cllm_spheres.checkpoint.files import NewFolder, leftovers, release, temporary
from cllm_spheres.errors import InputError
from cllm_spheres.units import size

GGUF_MAGIC = b"GGUF"


def check_folder(target: Path, names: Iterable[str], force: bool) -> None:
    """InputError where a folder of files with these names may not be put: with `force` only such a one is replaced."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise InputError(f"{target} is not a folder. Give another.")
    foreign = sorted(entry.name for entry in target.iterdir() if entry.name not in names or entry.is_dir())
    if foreign:
        raise InputError(
            f"{target} holds {foreign[0]!r}, which no export has written, and is left alone. Give another."
        )
    if not force and any(target.iterdir()):
        raise InputError(f"{target} holds a model already. Give another folder, or replace it with --force.")


def check_file(target: Path, force: bool) -> None:
    """InputError where a GGUF file may not be put: with `force` only such a one is replaced."""
    if not os.path.lexists(target):
        return
    if not target.is_file():
        raise InputError(f"{target} is not a file. Give the name of a file, such as {target / 'model.gguf'}.")
    with target.open("rb") as file:
        if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise InputError(f"{target} is not a GGUF file, and is left alone. Give another name.")
    if not force:
        raise InputError(f"{target} exists already. Give another name, or replace it with --force.")


def write_folder(target: Path, files: Mapping[str, Iterable[memoryview]]) -> dict[str, int]:
    """A folder with these files, in the place of one that `check_folder` has let pass; the bytes of each file."""
    disk = Disk()
    with _words(target):
        _make_room(target, disk)
        new = NewFolder(target.parent, disk)
        try:
            for name, chunks in files.items():
                new.write(name, chunks)
            sizes = {name: entry["bytes"] for name, entry in new.files.items()}
            new.place(target)
        except BaseException:
            new.discard()
            raise
    return sizes


def write_file(target: Path, write: Callable[[Path], None]) -> int:
    """A file that `write` makes under another name, in the place of one that `check_file` has let pass; its bytes."""
    disk = Disk()
    with _words(target):
        _make_room(target, disk)
        new = temporary(target.parent)
        try:
            write(new)
            descriptor = os.open(new, os.O_RDONLY | os.O_CLOEXEC)
            try:
                disk.sync(descriptor, new)
            finally:
                os.close(descriptor)
            disk.rename(new, target)
            disk.sync_folder(target.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                new.unlink()
            raise
        finally:
            release(new)
        return target.stat().st_size


def _make_room(target: Path, disk: Disk) -> None:
    """The folder above, without what killed exports have left in it: a run's own leftovers are the run's business."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for entry in leftovers(target.parent) if target.parent.name != "checkpoints" else []:
        with contextlib.suppress(OSError):
            remove_tree(entry, disk)


class _words:
    """OSError -> InputError with what to do next."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, InputError):
            free = ""
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                with contextlib.suppress(OSError):
                    free = f" {size(Disk().free_bytes(self.target.parent))} are free there."
            raise InputError(f"{self.target} cannot be written: {error.strerror}.{free} Give another place.") from None
