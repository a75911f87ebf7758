"""A run folder -> the right to change it, held by one process at a time.

The lock is the kernel's (flock on RUN/lock) and ends with its holder, whatever way that ends. Programs that
are started by exec do not inherit it, but a forked child shares it: each child must close `Lock.fileno()`
first thing, or the run stays locked as long as the child lives. (Closing the descriptor in a child does not
unlock; `release` there would.)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from types import TracebackType

from cllm_spheres.errors import InputError

NAME = "lock"


class Lock:
    """Held from construction to `release`, the end of a `with`, or the end of the process."""

    def __init__(self, run: Path) -> None:
        self.run = Path(run)
        self._descriptor: int | None = None
        path = self.run / NAME
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        except OSError as error:
            raise InputError(f"Cannot lock the run {run}: {path}: {error.strerror}.") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            holder = os.pread(descriptor, 20, 0).split(b"\n")[0].decode("ascii", "replace") or "unknown"
            os.close(descriptor)
            raise InputError(
                f"A run is going on in {run} (pid {holder}): wait for its end, or choose another --run."
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise InputError(f"Cannot lock the run {run}: {path}: {error.strerror}.") from None
        self._descriptor = descriptor

    def fileno(self) -> int:
        """The descriptor that a forked child must close."""
        assert self._descriptor is not None, "released"
        return self._descriptor

    def release(self) -> None:
        """Unlock, for forked children that share it too. Repeating it does nothing."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            with contextlib.suppress(OSError):  # a full disk does not keep a run locked
                os.ftruncate(descriptor, 0)
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def lock(run: Path) -> Lock:
    """Lock an existing run folder. Raises InputError where it is held already or cannot be written."""
    return Lock(run)


def is_held(run: Path) -> bool:
    """Whether a process has locked the run. Nothing is changed."""
    try:
        with (run / NAME).open("rb") as file:
            if not file.read(1):  # released: nobody has to be asked
                return False
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False
