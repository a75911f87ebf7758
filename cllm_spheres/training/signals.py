"""Signals, and the end of the caller -> a wish to stop, for Node Zero's process.

A terminal, Slurm or systemd sends a signal to the whole process group: then Node Zero gets it twice, directly and
passed on by the process that launched it. So signals are counted by where they came from, and the larger count is
what was meant: 1 stops and saves, 2 leaves at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SAME_S = 0.2  # some senders signal a process and then its group: what comes this soon after is the same wish


class Wishes:
    """`number` is the first signal that came, 0 before. All threads must have STOP_SIGNALS blocked."""

    def __init__(self, launcher: int, on_stop: Callable[[], None]) -> None:
        self.number = 0
        self.at = 0.0
        self._launcher = launcher
        self._on_stop = on_stop
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
            info = signal.sigwaitinfo(STOP_SIGNALS)
            self._came(info.si_signo, info.si_pid == self._launcher)

    def _caller(self) -> None:
        """The launcher holds the other end of standard input; its end means that it died."""
        sys.stdin.buffer.read()
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
