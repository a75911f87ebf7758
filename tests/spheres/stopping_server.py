"""The server of forked workers, one of which is stopped right after its fork: the next after a file was made."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from cllm_spheres.spheres import server

FILE = "CLLM_TEST_STOP"  # the environment's name for the file's path
_die_with = server.die_with


def die_with(parent: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        Path(os.environ[FILE]).unlink()
        os.kill(os.getpid(), signal.SIGSTOP)
    _die_with(parent)


if __name__ == "__main__":
    server.die_with = die_with
    server.main()
