"""Starting the server of forked workers: light to import, so that it warms up while Node Zero still imports."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

from cllm_spheres.spheres.server import die_with

THREAD_CAPS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


def clean_environment() -> dict[str, str]:
    """The environment of Node Zero and the server: thread caps stand before anything imports numpy."""
    return {**os.environ, **dict.fromkeys(THREAD_CAPS, "1")}


@dataclass(frozen=True)
class Server:
    """The server's process and our end of its socket."""

    process: subprocess.Popen[bytes]
    connection: socket.socket


def start_server(*likely: str) -> Server:
    """A server, warming up at once where dtype and width of the model are likely ones.

    Call it from the main thread: the kernel ends the server when the thread that started it ends.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "cllm_spheres.spheres.server", str(theirs.fileno()), str(os.getpid()),
         *likely],
        preexec_fn=partial(die_with, os.getpid()), pass_fds=[theirs.fileno()], env=clean_environment(),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    theirs.close()
    return Server(process, ours)
