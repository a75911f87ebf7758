"""Requests on a socket -> forked workers: `python -m cllm_spheres.spheres.server DESCRIPTOR PARENT_PID [DTYPE WIDTH]`.

A process that has imported the kernels and run a tiny step forks 63 workers in less than a second, each sharing
its memory. It has one thread, so forking is safe. It ends with Node Zero, and its workers with it (group.py).

Messages are JSON, one a packet. In: {"spawn": [workers], "job": {...}} with the shared memory's descriptor. Out:
{"status": text}, {"warm": dtype}, {"started": worker, "pid": pid} with a descriptor of the process, {"ended": worker,
"pid": pid, "status": wait status}.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from cllm_spheres.title import set_title

PACKET_BYTES = 1 << 16
# What a second process compiles; it leaves the telling to the server.
ENGINE = "from cllm_spheres.crystal import jit; jit.announce = lambda text: None; import cllm_spheres.spheres.engine"
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; ends at once where the parent is already gone.

    Between fork and exec too: a process that is stopped while Python starts in it has asked already.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def ignore_signals() -> None:
    """Only Node Zero acts on the signals that ask for an end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


class Server:
    """Forks workers, watches them, and says when one has ended."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.workers: dict[int, tuple[int, int]] = {}  # pidfd -> worker, pid
        self.warmed: set[str] = set()  # dtypes

    def say(self, **message: Any) -> None:
        self.connection.send(json.dumps(message).encode())

    def warm(self, dtype: str) -> None:
        """Compile and load all that workers of this dtype need; nothing where that has been done."""
        if dtype in self.warmed:
            return
        from cllm_spheres.crystal import jit

        before, jit.announce = jit.announce, lambda text: self.say(status=text)
        if jit.is_cold(dtype):
            # The engine in a process of its own and the kernels in this one: what each compiles, the other finds.
            engine = subprocess.Popen(
                [sys.executable, "-P", "-c", ENGINE],
                preexec_fn=partial(die_with, os.getpid()),
            )  # fmt: skip
            from cllm_spheres.model import dtypes

            dtypes.load(dtype)
            engine.wait()
        from cllm_spheres.spheres import worker

        scratch = os.memfd_create("cllm-spheres-warm", os.MFD_CLOEXEC)  # a file that no death can leave behind
        os.write(scratch, bytes(64))
        worker.warm(Path(f"/proc/self/fd/{scratch}"), dtype)
        os.close(scratch)
        jit.mark_warm(dtype)
        jit.announce = before
        gc.freeze()
        self.warmed.add(dtype)
        self.say(status="")

    def run(self) -> None:
        """Serve until Node Zero closes its end."""
        while True:
            ready, _, _ = select.select([self.connection.fileno(), *self.workers], [], [])
            for source in ready:
                if source == self.connection.fileno():
                    if not self.obey():
                        return
                elif source in self.workers:
                    self.reap(source)

    def obey(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self.connection, PACKET_BYTES, 1)
        if not data:
            return False
        message = json.loads(data)
        if "spawn" in message:
            self.warm(message["job"]["dtype"])
            self.say(warm=message["job"]["dtype"])
            set_title("server", message["job"]["run"])
            for worker in message["spawn"]:
                self.fork(worker, message["job"], descriptors[0])
            os.close(descriptors[0])
        return True

    def fork(self, worker: int, job: dict[str, Any], descriptor: int) -> None:
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                self.connection.close()
                for pidfd in self.workers:
                    os.close(pidfd)
                die_with(server)
                set_title(f"worker {worker} of {job['workers']}", job["run"])
                from cllm_spheres.spheres import worker as module
                from cllm_spheres.spheres.job import Job

                code = module.main(Job.from_dict(job), descriptor, worker)
            finally:
                os._exit(code)
        pidfd = os.pidfd_open(pid)
        self.workers[pidfd] = (worker, pid)
        socket.send_fds(self.connection, [json.dumps({"started": worker, "pid": pid}).encode()], [pidfd])

    def reap(self, pidfd: int) -> None:
        worker, pid = self.workers.pop(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self.say(ended=worker, pid=pid, status=status)


def main() -> None:
    """The server's process."""
    die_with(int(sys.argv[2]))
    ignore_signals()
    set_title("server")
    server = Server(socket.socket(fileno=int(sys.argv[1])))
    try:
        if sys.argv[3:]:
            from cllm_spheres.model.dtypes import choose

            server.warm(choose(sys.argv[3], int(sys.argv[4])))
        server.run()
    except (BrokenPipeError, ConnectionResetError):
        pass  # Node Zero is gone, and so are we; our workers end with us


if __name__ == "__main__":
    main()
