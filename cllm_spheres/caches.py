"""Where this user's compiled kernels and prepared text are kept: one folder for both, that can be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from cllm_spheres.limits import unwritable


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
        other = Path(tempfile.gettempdir()) / f"cllm-spheres-{os.getuid()}"
    except OSError:  # no temporary folder can be written
        return None
    return other if problem(other) is None else None


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
