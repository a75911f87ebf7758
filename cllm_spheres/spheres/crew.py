"""The server and the workers it forks, as Node Zero sees them: who lives, and how the others ended.

A thread listens to the server and watches its process. A worker counts as ended only when the kernel says so, through
a descriptor of its process, or because nobody of the server's process group is left: whoever takes over its work then
has it alone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cllm_spheres.errors import RunFailed
from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres.group import ready
from cllm_spheres.spheres.job import Job
from cllm_spheres.spheres.memory import SharedMemory
from cllm_spheres.spheres.server import PACKET_BYTES
from cllm_spheres.spheres.serving import Server, start_server

TOLD_WITHIN_S = 1.0  # of an end: by the server, which has nothing else to do
LEAVES_WITHIN_S = 5.0  # when told to
ENDS_WITHIN_S = 10.0  # after SIGKILL; a process that takes longer is held by the kernel, such as by a dead disk


def signal_name(number: int) -> str:
    """ "signal 9 (SIGKILL)"; real-time signals have no name."""
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


@dataclass(frozen=True)
class Ended:
    """A worker's end; status as os.waitpid gives it."""

    worker: int
    pid: int
    status: int
    with_server: bool = False  # because the server ended, which is its own death


class Crew:
    """The processes of a run. `pids` are the living workers."""

    def __init__(
        self, job: Job, memory: SharedMemory, ring: Callable[[], None], status: Callable[[str], None],
        server: Server | None = None,
    ) -> None:  # fmt: skip
        """ring: wakes Node Zero; status: told what a person may want to know; server: one that was started already."""
        self.job, self.memory, self._ring, self._status = job, memory, ring, status
        self.server = server or start_server()
        self.pids: dict[int, int] = {}
        self.warm_since: float | None = None  # when the kernels were ready; None: they are being compiled
        self._handles: dict[int, int] = {}  # worker -> pidfd
        self._asked: set[int] = set()  # workers that the server has been asked for and has not started yet
        self._ended: deque[Ended] = deque()
        self._held = False  # whether some of a server's group lived on after SIGKILL
        self._lock = threading.Lock()
        self._attach()

    def _attach(self) -> None:
        self.warm_since = None
        self.server_gone = False
        self._listener = threading.Thread(target=self._listen, args=(self.server,), daemon=True)
        self._listener.start()

    def _listen(self, server: Server) -> None:
        """Hear what the server says until its process ends, however many others hold its end of the connection."""
        poll = select.poll()
        for source in (server.connection.fileno(), server.group.handle):
            poll.register(source, select.POLLIN)
        with contextlib.suppress(OSError):
            while poll.poll()[0][0] == server.connection.fileno():  # before its end, which is last
                data, handles, _, _ = socket.recv_fds(server.connection, PACKET_BYTES, 1)
                if not data:
                    break
                self._hear(json.loads(data), handles)
                self._ring()
        server.group.signal(signal.SIGKILL)  # also whom it has forked and not told of
        held = not server.group.wait_for_all(ENDS_WITHIN_S)
        with self._lock:
            self.server_gone, self._held = True, held  # first: whoever sees an end of its workers sees its own
            for worker in list(self.pids):  # they end with their server, and nobody tells how
                self._take_out(worker, signal.SIGKILL, with_server=True)
            self._asked.clear()
        self._ring()

    def _hear(self, message: dict[str, object], handles: list[int]) -> None:
        with self._lock:
            if "status" in message and isinstance(message["status"], str):
                self._status(message["status"])
            elif "warm" in message:
                self.warm_since = time.monotonic()
            elif "started" in message:
                if not handles:  # the kernel has dropped the descriptor: the server is ended, which is noticed
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                worker = int(str(message["started"]))
                self.pids[worker], self._handles[worker] = int(str(message["pid"])), handles[0]
                os.set_inheritable(handles[0], False)
                self._asked.discard(worker)
            elif "ended" in message and self.pids.get(int(str(message["ended"]))) == message["pid"]:
                self._take_out(int(str(message["ended"])), int(str(message["status"])))

    def _take_out(self, worker: int, status: int, with_server: bool = False) -> None:
        os.close(self._handles.pop(worker))
        self._ended.append(Ended(worker, self.pids.pop(worker), status, with_server))

    def replace(self, job: Job) -> None:
        """All workers by those of another job, which are asked for. Nobody is in a command."""
        deadline = time.monotonic() + LEAVES_WITHIN_S
        while self._asked and not self.server_gone and time.monotonic() < deadline:
            time.sleep(0.002)  # whom it still starts it starts for the old job
        self.wait_for_ends(LEAVES_WITHIN_S, lambda: time.sleep(0.002))
        for worker in list(self.pids):
            self.kill_worker(worker)
        self.take_ended()
        self.job = job
        self.spawn(list(range(job.workers)))

    def spawn(self, workers: list[int]) -> None:
        """Have workers forked, by a new server where the last one has ended; `ready` tells when they are."""
        if self.server_gone:
            self.server.group.wait()
            self.server.close()
            self.server = start_server()
            self._attach()
        words = self.memory.worker_words()
        words[workers, M.W_READY], words[workers, M.W_STATE] = 0, M.State.STARTING
        with self._lock:
            if not self.server_gone:  # else the new one has ended already: that is noticed next
                self._asked |= set(workers)
        request = {"spawn": workers, "job": self.job.to_dict()}
        with contextlib.suppress(OSError):  # it has just ended: `server_gone` says so
            socket.send_fds(self.server.connection, [json.dumps(request).encode()], [self.memory.descriptor])

    def missing(self) -> list[int]:
        """Workers that neither live nor have been asked for."""
        with self._lock:
            return [
                worker for worker in range(self.job.workers) if worker not in self.pids and worker not in self._asked
            ]

    def ready(self) -> bool:
        """Whether every worker is known and waits for commands."""
        words = self.memory.worker_words()[: self.job.workers]
        return len(self.pids) == self.job.workers and bool(words[:, M.W_READY].all())

    def take_ended(self) -> list[Ended]:
        """Those who have ended since the last call. RunFailed where the kernel holds some who should have."""
        if self._held:
            raise RunFailed("Workers hang in the kernel and cannot be ended, not even by SIGKILL.")
        with self._lock:
            return [self._ended.popleft() for _ in range(len(self._ended))]

    @property
    def lost(self) -> bool:
        """Whether somebody has ended whom nobody asked to."""
        return bool(self._ended) or self.server_gone

    def kill_worker(self, worker: int) -> None:
        """SIGKILL, and its end confirmed: it is among those who have ended. RunFailed where the kernel holds it.

        A server that does not tell of the end hangs too, and is ended, with all its workers.
        """
        with self._lock:
            handle, pid = self._handles.get(worker), self.pids.get(worker)
            if handle is None:
                return
            handle = os.dup(handle)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        ended = ready(handle, ENDS_WITHIN_S)
        os.close(handle)
        if not ended:
            raise RunFailed(
                f"Worker {worker} (pid {pid}) hangs in the kernel and cannot be ended, not even by SIGKILL."
            )

        deadline = time.monotonic() + TOLD_WITHIN_S
        while self.pids.get(worker) == pid and not self.server_gone:
            if time.monotonic() > deadline:
                self.server.group.signal(signal.SIGKILL)
            time.sleep(0.002)

    def wait_for_ends(self, seconds: float, wait: Callable[[], None]) -> None:
        """Wait until no worker lives, at most so many seconds."""
        deadline = time.monotonic() + seconds
        while self.pids and not self.server_gone and time.monotonic() < deadline:
            wait()

    def kill(self) -> None:
        """SIGKILL for the server and all workers, and their end confirmed, unless the kernel holds them."""
        self.server.group.signal(signal.SIGKILL)
        self._listener.join(2 * ENDS_WITHIN_S)
        if self.server.group.wait(ENDS_WITHIN_S) is not None:
            self.server.close()

    def server_end(self) -> str:
        """How the server ended, in words. RunFailed where the kernel holds it."""
        code = self.server.group.wait(ENDS_WITHIN_S)
        if code is None:
            raise RunFailed(
                f"The process that starts the workers (pid {self.server.pid}) hangs in the kernel and cannot be ended,"
                " not even by SIGKILL."
            )
        return f"ended by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
