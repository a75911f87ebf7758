"""The control process's hold on its spheres: starts, commands, watches and ends the workers.

Node Zero never computes a batch. It writes commands into shared memory and waits on a bell that workers ring when
a command is finished; a thread listens to the server and rings it too when a worker ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from cllm_spheres.errors import RunFailed, SphereLost
from cllm_spheres.machine import available_memory, usable_cores
from cllm_spheres.spheres import atomics
from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres.job import Job
from cllm_spheres.spheres.memory import SharedMemory
from cllm_spheres.spheres.placement import Claims, claim, read_cores
from cllm_spheres.spheres.server import PACKET_BYTES
from cllm_spheres.spheres.serving import Server, start_server
from cllm_spheres.spheres.topology import hosted
from cllm_spheres.units import size

LOOK_AROUND_S = 0.1  # how often Node Zero wakes without a bell
SILENCE_S = 120.0  # a worker that computes raises its progress at every layer; after this long it counts as hung


class NodeZero:
    """The spheres of one run. `memory` is valid from `start` to `close`."""

    def __init__(
        self, job: Job, status: Callable[[str], None] = lambda text: None, look: Callable[[], None] = lambda: None,
        server: Server | None = None,
    ) -> None:  # fmt: skip
        """status: told what a person may want to know; look: called about ten times a second in `start` and `do`;
        server: one that has been started already.
        """
        # The plan names cores as if the machine were ours; here those are taken that no other run has.
        self._claims, cores = claim(job.workers, read_cores(usable_cores())) if job.cores else (Claims(), [])
        self.job = job = replace(job, cores=cores)
        self.memory = SharedMemory(job.sizes)
        self._status, self._look, self._server_given = status, look, server
        self._lost: list[tuple[int, int, int]] = []  # worker, pid, wait status
        self._pids: dict[int, int] = {}
        self._ended: set[int] = set()
        self._warm = threading.Event()
        self._server_gone = False
        self._closing = False
        self._command = 0
        for word, seconds, nanoseconds in (
            (M.LONG_TIMEOUT, 1, 0),
            (M.SHORT_TIMEOUT, 0, int(LOOK_AROUND_S * 1e9)),
        ):
            self._words(word, 2)[:] = (seconds, nanoseconds)
        self._progress = np.zeros((job.workers, M.WORKER_WORDS), np.int64)
        self._silent_s = np.zeros(job.workers)
        self._looked_at = time.monotonic()

    # ---- starting and ending

    def start(self) -> None:
        """The server and all workers; returns when every worker is ready. RunFailed where memory ran out."""
        # The few pages that everybody writes are taken here, so that no worker can meet a bus error in them.
        self.memory.allocate(0, self.memory.regions.params)
        server = self._server_given or start_server()
        self._server, self._connection = server.process, server.connection
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        request = {"spawn": list(range(self.job.workers)), "job": self.job.to_dict()}
        socket.send_fds(self._connection, [json.dumps(request).encode()], [self.memory.descriptor])
        while not self._warm.wait(LOOK_AROUND_S):  # it may compile for a while
            self._look()
            self._check_server()
        ready = self.memory.worker_words()[:, M.W_READY]
        while not ready.all():
            self.wait_for_bell()
            self._look()
            self.check()

    def close(self) -> None:
        """End every worker and the server; nothing of the run is left when this returns."""
        if not hasattr(self, "_server"):
            return
        self._closing = True
        if not self._server_gone and not self._lost and self._idle():
            self._give(M.EXIT, 0, 0)
            deadline = time.monotonic() + 5
            while len(self._ended) < len(self._pids) and not self._server_gone and time.monotonic() < deadline:
                self.wait_for_bell()
        self.kill()

    def kill(self) -> None:
        """SIGKILL for all workers, confirmed by their parent, then the server's end."""
        self._claims.keep([])
        self._closing = True
        self._set(M.ABORT, 1)
        atomics.wake_all(self.memory.control(M.RELEASE))
        if not self._pids:
            self._server.kill()  # it is still compiling and hears nothing
        try:
            self._connection.send(json.dumps({"kill": True}).encode())
        except OSError:
            self._server_gone = True
        deadline = time.monotonic() + 10
        while len(self._ended) < len(self._pids) and not self._server_gone and time.monotonic() < deadline:
            time.sleep(0.002)
        with contextlib.suppress(OSError):  # the server may have closed it already
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        try:
            self._server.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()

    def _listen(self) -> None:
        try:
            while data := self._connection.recv(PACKET_BYTES):
                message = json.loads(data)
                if "status" in message and isinstance(message["status"], str):
                    self._status(message["status"])
                elif "warm" in message:
                    self._warm.set()
                elif "started" in message:
                    self._pids[message["started"]] = message["pid"]
                elif "ended" in message:
                    if not self._closing:
                        self._lost.append((message["ended"], message["pid"], message["status"]))
                    self._ended.add(message["pid"])
                self.ring_bell()
        except OSError:
            pass  # the connection was closed by `kill`
        self._server_gone = True
        self.ring_bell()

    # ---- commands

    def give(self, kind: int, first: int = 0, last: int = 0) -> None:
        """Begin a command; `finished` tells when it is done."""
        for word in (M.ABORT, M.HALT):
            self._set(word, 0)
        self._silent_s[:] = 0
        self._give(kind, first, last)

    def do(self, kind: int, first: int = 0, last: int = 0) -> None:
        """A whole command: begin it and wait for its end."""
        self.give(kind, first, last)
        while not self.finished():
            self.wait_for_bell()
            self._look()
            self.check()

    def finished(self) -> bool:
        """Whether the last command has been finished by all workers."""
        return self._get(M.FINISHED) == self._command

    def wait_for_bell(self) -> None:
        """Sleep until something happens, at most 0.1 s; other threads run meanwhile."""
        address = self.memory.control(M.BELL)
        seen = atomics.load_word(address)
        if seen == self._heard:
            atomics.wait_while(address, seen, self.memory.control(M.SHORT_TIMEOUT))
        self._heard = atomics.load_word(address)

    _heard = 0

    def ring_bell(self) -> None:
        """Wake Node Zero; any thread may."""
        atomics.add_to_word(self.memory.control(M.BELL), 1)
        atomics.wake_all(self.memory.control(M.BELL))

    def request_stop(self) -> None:
        """No further step begins; the current one ends."""
        self._set(M.STOP, 1)

    def close_gate(self) -> bool:
        """Drop the current step before its update. False while an update is being applied: try again soon."""
        done = self._get(M.DONE)
        return atomics.exchange_word(self.memory.control(M.GATE), done, -1 - done) == done

    def set_position(self, step: int, applied: int) -> None:
        """Say where the run stands before its first command: whole steps, and updates among them."""
        for word, value in ((M.DONE, step), (M.GATE, step), (M.APPLIED, applied)):
            self._set(word, value)

    @property
    def done(self) -> int:
        """The last whole step."""
        return self._get(M.DONE)

    @property
    def applied(self) -> int:
        """Updates applied so far: the steps that were not skipped."""
        return self._get(M.APPLIED)

    @property
    def halt(self) -> int:
        """Why the last command of steps ended early: HALT_STOP, HALT_NONFINITE, or 0."""
        return self._get(M.HALT)

    @property
    def pids(self) -> dict[int, int]:
        """Worker -> process."""
        return dict(self._pids)

    @property
    def server_pid(self) -> int:
        return self._server.pid

    def check(self) -> None:
        """SphereLost where a worker has ended or hangs; RunFailed where the server has gone."""
        if self._lost:
            raise SphereLost(self._describe(*self._lost[0]))
        self._check_server()
        now = time.monotonic()
        # A clock of our own: where Node Zero itself did not run (suspended, frozen), no time has passed.
        passed, self._looked_at = min(now - self._looked_at, 1.0), now
        words = self.memory.worker_words()
        moved = (words != self._progress).any(axis=1)
        # Whoever has come to the current barrier waits for others; one that was stopped asleep there has not moved on.
        waits = words[:, M.W_ARRIVED] > self._get(M.RELEASE)
        if self._idle():
            waits |= words[:, M.W_STATE] == M.S_IDLE
        self._silent_s = np.where(moved | waits, 0.0, self._silent_s + passed)
        self._progress[:] = words
        if self._silent_s.max() > SILENCE_S:
            worker = int(self._silent_s.argmax())
            state = M.STATES[int(words[worker, M.W_STATE])]
            raise SphereLost(
                f"{self._names(worker)} (pid {self._pids.get(worker)}) did nothing for {SILENCE_S:.0f} s while {state},"
                f" step {self.done + 1}. It may be stopped (SIGSTOP) or starved of its core."
            )

    # ---- inside

    def _describe(self, worker: int, pid: int, status: int) -> str:
        state = M.STATES[int(self.memory.worker_words()[worker, M.W_STATE])]
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            how = f"ended by signal {number} ({signal.Signals(number).name})"
        else:
            how = f"ended with exit code {os.waitstatus_to_exitcode(status)}"
        text = f"{self._names(worker)} (pid {pid}) {how} while {state}, step {self.done + 1}."
        said = self.memory.error(worker)
        if said:
            text += f"\nIt said: {said}"
        if "memory" in said or "space" in said or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            text += (
                f"\nOften the machine ran out of memory: this run shares {size(self.memory.regions.total)},"
                f" {size(available_memory())} are available now. Try fewer --spheres or --workers."
            )
        return text

    def _names(self, worker: int) -> str:
        spheres = list(hosted(worker, self.job.workers, self.job.spheres))
        names = ", ".join(map(str, spheres[:6])) + (", ..." if len(spheres) > 6 else "")
        return f"{'sphere' if len(spheres) == 1 else 'spheres'} {names} of worker {worker}"

    def _check_server(self) -> None:
        if self._server_gone and not self._closing:
            code = self._server.wait(timeout=5)
            how = (
                f"ended by signal {-code} ({signal.Signals(-code).name})"
                if code < 0
                else f"ended with exit code {code}"
            )
            raise RunFailed(f"The process that starts the workers (pid {self._server.pid}) {how}.")

    def _idle(self) -> bool:
        return self._command == 0 or self.finished()

    def _give(self, kind: int, first: int, last: int) -> None:
        for word, value in ((M.KIND, kind), (M.FIRST, first), (M.LAST, last)):
            self._set(word, value)
        self._command += 1
        self._set(M.COMMAND, self._command)
        atomics.wake_all(self.memory.control(M.COMMAND))

    def _words(self, word: int, count: int = 1) -> np.ndarray:
        return self.memory.words(self.memory.regions.control + word * M.LINE, count)

    def _get(self, word: int) -> int:
        return int(atomics.load_word(self.memory.control(word)))

    def _set(self, word: int, value: int) -> None:
        atomics.store_word(self.memory.control(word), value)

    def rehearsal_s(self, workers: int) -> float:
        """Seconds that one sequence took the slowest of the first workers in the last REHEARSE."""
        return float(self.memory.worker_words()[:workers, M.W_REHEARSAL_NS].max()) / 1e9

    def statistics(self) -> dict[str, Any]:
        """Copies of the workers' and spheres' words."""
        return {"workers": self.memory.worker_words().copy(), "spheres": self.memory.sphere_words().copy()}
