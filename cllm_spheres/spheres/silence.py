"""The workers' words in shared memory -> who hangs: whose words have not moved for much longer than a step takes."""

from __future__ import annotations

import time

import numpy as np

from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres.memory import SharedMemory

# A worker that computes raises its progress at every layer, one that updates at every block. It counts as hung when it
# did not for this many times the longest step so far, within bounds.
STEPS, LEAST_S, MOST_S = 20, 10.0, 120.0


class Silence:
    """Looks around when it is asked to, about ten times a second."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory
        self._words = memory.worker_words().copy()
        self._silent_s = np.zeros(len(self._words))
        self._looked_at = time.monotonic()

    def forgive(self) -> None:
        """Count anew: a new command begins."""
        self._silent_s[:] = 0

    def hung(self, workers: int, command: int, release: int) -> tuple[int, float] | None:
        """Who of the first workers hangs within a command, and for how many seconds; release: barriers passed."""
        now = time.monotonic()
        # A clock of our own: where Node Zero itself did not run (suspended, frozen), no time has passed.
        passed, self._looked_at = min(now - self._looked_at, 1.0), now
        words = self._memory.worker_words()
        moved = (words != self._words).any(axis=1)
        self._words[:] = words
        # Whoever sleeps at the current barrier waits for others. The last to arrive does not: it has to release them.
        waits = (words[:, M.W_ARRIVED] > release) & (words[:, M.W_STATE] == M.State.WAITING)
        # Whoever has left the command is idle, but for the one that must still notice the next.
        waits |= (words[:, M.W_LEFT] == command) | (words[:, M.W_READY] == 0)
        self._silent_s = np.where(moved | waits, 0.0, self._silent_s + passed)
        worker = int(self._silent_s[:workers].argmax())
        seconds = float(self._silent_s[worker])
        if seconds <= self._most():
            return None
        self._silent_s[worker] = 0
        return worker, seconds

    def _most(self) -> float:
        """How long a worker may do nothing that can be seen."""
        records = self._memory.ring_words()
        longest = float((records[:, M.R_END_NS] - records[:, M.R_START_NS]).max()) / 1e9
        return min(MOST_S, max(LEAST_S, STEPS * longest)) if longest > 0 else MOST_S
