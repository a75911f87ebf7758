"""Where this user's compiled kernels and prepared text are kept: one folder for both, that can be written."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from pathlib import Path

from cllm_spheres.limits import unwritable

TRIES, TRY_AGAIN_S = 100, 0.01  # of `use`, where a folder is cleared again and again


def wanted() -> Path:
    """cllm-spheres below $XDG_CACHE_HOME or ~/.cache."""
    top = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(top) / "cllm-spheres"


def folder() -> Path | None:
    """The wanted folder, or where it cannot be used, one in the temporary folder; None where neither can be used.

    Safe to delete: what lies in it is made again.
    """
    if problem(wanted()) is None:
        return wanted()
    try:
        other = _other()
    except OSError:  # no temporary folder can be written
        return None
    return other if problem(other) is None else None


def _other() -> Path:
    return Path(tempfile.gettempdir()) / f"cllm-spheres-{os.getuid()}"


def places() -> list[Path]:
    """Those of both folders that are there and belong to this user; nothing is made."""
    found = [wanted()]
    with contextlib.suppress(OSError):
        found.append(_other())
    return [place for place in found if _is_ours(place)]


def _is_ours(place: Path) -> bool:
    try:
        return place.is_dir() and place.stat().st_uid == os.getuid()
    except OSError:  # it lies in a folder that may not be entered
        return False


def use(place: Path) -> int | None:
    """Make a folder, and keep it from being cleared while this process, or one that it forks, lives; its descriptor.

    None where that cannot be promised: on a file system without locks. OSError where it cannot be made.
    """
    for _ in range(TRIES):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # it has just been cleared
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), place.stat()):
                return descriptor
        except BlockingIOError:
            time.sleep(TRY_AGAIN_S)  # somebody looks whether it is used, or clears it: it has another name then
        except FileNotFoundError:
            pass  # it has just been cleared
        except OSError:
            os.close(descriptor)
            return None
        os.close(descriptor)
    return None


def is_used(place: Path) -> bool:
    """Whether a process uses a folder; where a file system has no locks that is not known, and False."""
    with contextlib.suppress(OSError):
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False


def problem(place: Path) -> str | None:
    """Why nothing can be kept in a folder, which is made where it is missing; None where it can be used.

    A folder that belongs to another user is not used: code is loaded from it.
    """
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        if place.stat().st_uid != os.getuid():
            return f"{place} belongs to another user"
        return unwritable(place)
    except OSError as error:
        return f"{place} cannot be made: {error.strerror}"
