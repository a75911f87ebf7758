"""A folder -> a way into it that stays good when the folder is renamed, and what the folder is called now.

A path names whatever lies there at the moment. A process that works in a folder for hours holds a descriptor of it
instead, and reaches its files through /proc/self/fd: they stay those of the same folder, though somebody may rename it
and make another of the old name.
"""

from __future__ import annotations

import os
import re
import weakref
from pathlib import Path

from cllm_spheres.errors import InputError


class Held:
    """A folder that is held open until `close`. `path` is for opening files, `name` for people."""

    def __init__(self, folder: Path) -> None:
        """InputError where there is no folder that may be read."""
        self._given = Path(folder)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(f"Cannot open the folder {folder}: {error.strerror}.") from None
        self.path = Path(f"/proc/self/fd/{descriptor}")  # of this process alone: another may not be given it
        self._descriptor = descriptor
        self._shown = re.compile(rf"{re.escape(str(self.path))}(?![0-9])")
        self.close = weakref.finalize(self, os.close, descriptor)

    @property
    def identity(self) -> list[int]:
        """Device and inode: no other folder has both as long as this one is held."""
        stat = os.fstat(self._descriptor)
        return [stat.st_dev, stat.st_ino]

    @property
    def name(self) -> Path:
        """The folder as it was named at first, while that leads to it or nothing else does; else its present path."""
        now = Path(os.readlink(self.path))
        if _leads_to(self._given, self.identity) or not _leads_to(now, self.identity):
            return self._given
        relative = not self._given.is_absolute() and now.is_relative_to(Path.cwd())
        return now.relative_to(Path.cwd()) if relative else now

    def said(self, text: str) -> str:
        """A message for people, in which the folder has its present name instead of `path`."""
        return self._shown.sub(lambda _: str(self.name), text)


def _leads_to(path: Path, identity: list[int]) -> bool:
    try:
        stat = os.stat(path)
    except OSError:
        return False
    return [stat.st_dev, stat.st_ino] == identity
