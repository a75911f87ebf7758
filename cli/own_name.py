"""How this command line was called -> its name in lines that a person is to type, so that they work as they stand."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

NAME = "cllm-spheres"


def own_name() -> str:
    """cllm-spheres, where that is what the shell would find; else the path that was called, or python -m."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py" and called.parent.name == "cllm_spheres":
        return f"{shlex.quote(_short(sys.executable))} -m cllm_spheres"
    found = shutil.which(NAME)
    if called.name != NAME or (found is not None and os.path.realpath(found) == os.path.realpath(called)):
        return NAME
    return shlex.quote(_short(str(called)))


def _short(path: str) -> str:
    """A path from here on, where it lies below the working folder."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") or os.sep not in relative else relative
