"""Paths and bytes -> changes on disk, one method for each kind: the only place that changes a checkpoint.

Everything passes through `before`, so that a test, or a fault on purpose, can fail or end the process at any
one operation. Reading needs no such place: what is read is verified.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

RENAME_EXCHANGE = 2  # linux/fs.h
AT_FDCWD = -100  # linux/fcntl.h: paths are relative to the working directory


class Disk:
    """The real disk. `before(operation, *paths)` is called before each operation and may raise OSError."""

    def __init__(self, before: Callable[..., None] | None = None) -> None:
        self._before = before or (lambda operation, *paths: None)

    def create_folder(self, path: Path) -> None:
        self._before("create_folder", path)
        path.mkdir()

    def create(self, path: Path) -> int:
        """A new, empty file; returns its descriptor. An existing one is an error."""
        self._before("create", path)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, path: Path, data: memoryview) -> None:
        """All of `data`, bytes, at the end of the open file."""
        self._before("write", path)
        while data:
            data = data[os.write(descriptor, data) :]

    def sync(self, descriptor: int, path: Path) -> None:
        self._before("sync", path)
        os.fsync(descriptor)

    def sync_folder(self, path: Path) -> None:
        """The names in a folder, as they are now, survive a power cut."""
        self._before("sync_folder", path)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        self._before("rename", source, target)
        os.rename(source, target)

    def exchange(self, one: Path, other: Path) -> None:
        """Both exist and swap their names in one step. OSError EINVAL where the file system cannot."""
        self._before("exchange", one, other)
        try:
            renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
        except AttributeError:  # glibc older than 2.28
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(one)) from None
        if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(one))

    def symlink(self, target: str, path: Path) -> None:
        self._before("symlink", path)
        os.symlink(target, path)

    def remove(self, path: Path) -> None:
        """A file or a link."""
        self._before("remove", path)
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        """An empty folder."""
        self._before("remove_folder", path)
        path.rmdir()

    def free_bytes(self, path: Path) -> int:
        """What this user may still write there."""
        stats = os.statvfs(path)
        return stats.f_bavail * stats.f_frsize


def remove_tree(path: Path, disk: Disk) -> None:
    """A folder with all it holds, or a file or link; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        for entry in sorted(path.iterdir()):
            remove_tree(entry, disk)
        disk.remove_folder(path)
    else:
        disk.remove(path)
