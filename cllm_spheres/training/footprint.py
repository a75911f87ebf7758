"""Processes of a run -> the bytes of memory that each takes for itself.

Workers are forked, and share most of their pages with the server until they write. Counting the resident pages of each
counts those as often as there are workers: 13.4 GB for 63 of them, where 0.9 GB were taken. The kernel knows better
(Pss_Anon in smaps_rollup: private pages, and of a shared one its part), but has to walk through all pages for it, 7 ms
a process. So each time one process is looked at, in turn.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterable
from pathlib import Path

AT_ONCE_AT_FIRST = 3  # Node Zero, the server and a worker, which the others resemble


def own_bytes(pid: int) -> int:
    """What a process takes for itself; pages of files, which the kernel can drop, are left out. OSError if it ended."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1]) * 1024
    return 0


class Footprint:
    """Of one run. A process that was not looked at yet is taken for a typical one."""

    def __init__(self) -> None:
        self._own: dict[int, int] = {}  # by process, the one that was looked at last at the end

    def update(self, pids: Iterable[int]) -> dict[int, int]:
        """The bytes of each of the processes that live now."""
        pids = list(pids)
        self._own = {pid: size for pid, size in self._own.items() if pid in pids}
        unknown = [pid for pid in pids if pid not in self._own]
        for pid in [*unknown, *self._own][: 1 if self._own else AT_ONCE_AT_FIRST]:
            self._own.pop(pid, None)
            with contextlib.suppress(OSError):  # it has just ended
                self._own[pid] = own_bytes(pid)
        typical = round(statistics.median(self._own.values())) if self._own else 0
        return {pid: self._own.get(pid, typical) for pid in pids}
