"""A role, and a run's name -> what `top` and `ps` show of this process, instead of one Python like the other."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

_PR_SET_NAME = 15


def set_title(role: str, run: str = "") -> None:
    """role: such as "worker 3 of 8", of which the first 15 bytes of "cllm worker 3" stand in top.

    The title is written over the command line that the process was started with, and cut where that ends. Where /proc
    does not say where it lies, nothing is shown.
    """
    short, title = f"cllm {role.partition(' of ')[0]}", f"cllm-spheres {role}{': ' if run else ''}{run}"
    ctypes.CDLL(None).prctl(_PR_SET_NAME, short.encode(), 0, 0, 0)
    with contextlib.suppress(OSError, ValueError, IndexError):
        after_the_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = (int(field) for field in after_the_name[45:47])  # arg_start and arg_end, fields 48 and 49
        if start and len(Path("/proc/self/cmdline").read_bytes()) == end - start:  # what lies there is what is shown
            text = title.encode("utf-8", "replace")[: end - start - 1].decode(errors="ignore").encode()
            ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)  # zeros to the end, or more is shown
