"""A run folder -> the right to change it, held by one process at a time.

The lock is the kernel's and ends with its holder, whatever way that ends: flock on RUN/lock, which holds the holder's
process number, and on the folder itself, so that it stays locked where somebody deletes that file. (Some network file
systems lock no folders; there the file alone counts.) Programs that are started by exec do not inherit it, but a forked
child shares it: each child must close `Lock.descriptors` first thing, or the run stays locked as long as the child
lives. (Closing them in a child does not unlock; `release` there would.)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path
from types import TracebackType

from cllm_spheres.errors import InputError

NAME = "lock"
TRIES, TRY_AGAIN_S = 3, 0.02


class Lock:
    """Of an existing run folder: held from construction to `release`, the end of a `with`, or the end of the process.

    Raises InputError where it is held already or cannot be written.
    """

    def __init__(self, run: Path) -> None:
        self.run = Path(run)
        self.descriptors: list[int] = []  # those that a forked child must close
        path = self.run
        try:
            self.descriptors.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            folder_is_free = self._take_folder()
            path = self.run / NAME
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
            self.descriptors.append(os.open(path, flags, 0o666))
            if not (folder_is_free and self._take(self.descriptors[1])):
                holder = os.pread(self.descriptors[1], 20, 0).split(b"\n")[0].decode("ascii", "replace") or "unknown"
                raise InputError(
                    f"A run is going on in {run} (pid {holder}): wait for its end, or choose another --run."
                )
            os.ftruncate(self.descriptors[1], 0)
            os.pwrite(self.descriptors[1], f"{os.getpid()}\n".encode(), 0)
        except BaseException as error:
            for descriptor in self.descriptors:
                os.close(descriptor)
            if isinstance(error, OSError):
                raise InputError(f"Cannot lock the run {run}: {path}: {error.strerror}.") from None
            raise

    def _take_folder(self) -> bool:
        """Whether nobody else has locked the folder; where a file system locks no folders, nobody has."""
        try:
            return self._take(self.descriptors[0])
        except OSError:
            return True

    @staticmethod
    def _take(descriptor: int) -> bool:
        """Whether the lock is ours now, and nobody else's. `is_held` may have it for a moment."""
        for _ in range(TRIES):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(TRY_AGAIN_S)
            else:
                return True
        return False

    def release(self) -> None:
        """Unlock, for forked children that share it too. Repeating it does nothing."""
        descriptors, self.descriptors = self.descriptors, []
        if descriptors:
            with contextlib.suppress(OSError):  # a full disk does not keep a run locked
                os.ftruncate(descriptors[1], 0)
        for descriptor in descriptors:
            with contextlib.suppress(OSError):  # a folder that cannot be locked
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_held(run: Path) -> bool:
    """Whether a process has locked the run. Nothing is changed; a lock that is taken meanwhile waits for a moment."""
    for path in (run, run / NAME):
        with contextlib.suppress(OSError):  # there is none, or a file system without locks
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            finally:
                os.close(descriptor)
    return False
