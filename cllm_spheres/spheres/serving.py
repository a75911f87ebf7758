"""Starting the server of forked workers: light to import, so that it warms up while Node Zero still imports."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass

from cllm_spheres.errors import RunFailed
from cllm_spheres.spheres.group import ProcessGroup

MODULE = "cllm_spheres.spheres.server"
THREAD_CAPS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


def clean_environment() -> dict[str, str]:
    """The environment of Node Zero and the server: thread caps stand before anything imports numpy."""
    return {**os.environ, **dict.fromkeys(THREAD_CAPS, "1")}


@dataclass(frozen=True)
class Server:
    """The server and all that it forks, and our end of its socket."""

    group: ProcessGroup
    connection: socket.socket

    @property
    def pid(self) -> int:
        return self.group.pid

    def close(self) -> None:
        """Give the descriptors back, once the server has ended."""
        self.connection.close()
        self.group.close()


def start_server(*likely: str) -> Server:
    """A server, warming up at once where dtype and width of the model are likely ones. Call it from the main thread.

    RunFailed where the kernel lets no further process be started.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-P", "-m", MODULE, str(theirs.fileno()), str(os.getpid()), *likely]
    try:
        group = ProcessGroup(command, [theirs.fileno()], clean_environment())
    except OSError as error:
        ours.close()
        raise RunFailed(
            f"The process that starts the workers cannot be started: {error.strerror}. Look at the limits:"
            " cllm-spheres doctor"
        ) from None
    finally:
        theirs.close()
    return Server(group, ours)
