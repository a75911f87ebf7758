"""Signals, and the end of the caller -> a wish to stop, for Node Zero's process.

A terminal, Slurm or systemd sends a signal to the whole process group: then Node Zero gets it twice, directly and
passed on by the process that launched it. So signals are counted by where they came from, and the larger count is
what was meant: 1 stops and saves, 2 leaves at once. Ctrl+Z stops the spheres too, until the run is continued.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from cllm_spheres.spheres.group import ready

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HEEDED = (*STOP_SIGNALS, signal.SIGTSTP)
_SAME_S = 0.2  # some senders signal a process and then its group: what comes this soon after is the same wish


@dataclass(frozen=True)
class Launcher:
    """The process that started this one. `handle` is a descriptor of it, readable once it has ended."""

    pid: int
    handle: int

    @classmethod
    def watched(cls, pid: int) -> Launcher | None:
        """None where it has ended already, and its number may be another's."""
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        return cls(pid, handle) if os.getppid() == pid else None


class Wishes:
    """`number` is the first signal that came, 0 before. All threads must have the signals of HEEDED blocked."""

    def __init__(self, launcher: Launcher, on_stop: Callable[[], None], to_spheres: Callable[[int], None]) -> None:
        """on_stop: called when somebody wishes an end; to_spheres: sends the spheres' processes a signal."""
        self.number = 0
        self.at = 0.0
        self._launcher = launcher
        self._on_stop, self._to_spheres = on_stop, to_spheres
        self._counts = {True: 0, False: 0}
        self._last = {True: -1.0, False: -1.0}
        for target in (self._signals, self._caller):
            threading.Thread(target=target, daemon=True).start()

    @property
    def name(self) -> str:
        """The first signal's name, such as SIGINT."""
        return signal.Signals(self.number).name

    def _signals(self) -> None:
        while True:
            info = signal.sigwaitinfo(HEEDED)
            if info.si_signo == signal.SIGTSTP:
                self._pause()
            else:
                self._came(info.si_signo, info.si_pid == self._launcher.pid)

    def _pause(self) -> None:
        """Ctrl+Z: stop until we are continued, with the spheres, whose process group the terminal does not reach."""
        self._to_spheres(signal.SIGSTOP)
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        self._to_spheres(signal.SIGCONT)

    def _caller(self) -> None:
        ready(self._launcher.handle, None)
        self._came(signal.SIGHUP, True)

    def _came(self, number: int, passed_on: bool) -> None:
        now = time.monotonic()
        if now - self._last[passed_on] >= _SAME_S:
            self._counts[passed_on] += 1
        self._last[passed_on] = now
        if not self.number:
            self.number, self.at = number, now
        if max(self._counts.values()) >= 2:
            os._exit(128 + self.number)  # the kernel ends the server and the workers with this process
        self._on_stop()
