"""Requests -> a line each on a descriptor: who asked for which path, and what it cost; no texts, no keys.

    2026-03-01T12:00:00.123+00:00 127.0.0.1 POST /v1/completions 200 in=4 out=60 seconds=0.482

What a client chose freely is not written: a path that does not exist is "other", a query is left out.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from datetime import UTC, datetime

MOST_WAITING = 10_000  # lines; what comes beyond them is only counted
END_S = 2.0  # for the last lines to be taken
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"))


class AccessLog:
    """A log that is written by a thread of its own, so that a reader that takes nothing does not hold the server up."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines: queue.Queue[str | None] = queue.Queue(MOST_WAITING)
        self._num_lost = 0
        self._thread = threading.Thread(target=self._write_all, daemon=True)
        self._thread.start()

    def add(
        self, client: str, method: str, path: str, status: str, seconds: float, tokens: tuple[int, int] | None = None
    ) -> None:
        """Write a line, soon. path: one of our own, or "other"; tokens: of the prompts and of the new text."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        counts = f"in={tokens[0]} out={tokens[1]}" if tokens else "in=- out=-"
        method = method if method in METHODS | {"-"} else "other"
        try:
            if self._num_lost:
                self._lines.put_nowait(
                    f"{now} {self._num_lost} requests are missing here: the log was not read in time"
                )
                self._num_lost = 0
            self._lines.put_nowait(f"{now} {client} {method} {path} {status} {counts} seconds={seconds:.3f}")
        except queue.Full:
            self._num_lost += 1

    def close(self) -> None:
        """Write what waits, as far as it is taken."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
            self._thread.join(END_S)

    def _write_all(self) -> None:
        with contextlib.suppress(OSError):  # nobody reads any more: the lines that still come are counted, no more
            while (line := self._lines.get()) is not None:
                data = f"{line}\n".encode()
                while data:
                    data = data[os.write(self._descriptor, data) :]
