"""Workers that have ended -> whether the run can go on, and the sentences that say what happened.

One place that loses its worker again and again within one step is given up; a sphere whose shard ends three workers
ends the run, because a fourth would meet the same. A step that becomes whole forgets them all.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

from cllm_spheres.errors import SphereLost
from cllm_spheres.machine import available_memory, memory_kills, memory_limit
from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres.crew import Ended, signal_name
from cllm_spheres.spheres.job import Job
from cllm_spheres.spheres.memory import SharedMemory
from cllm_spheres.spheres.topology import hosted
from cllm_spheres.units import size

MOST_DEATHS = 3  # within one step: at one place, or of one sphere's hosts


class Losses:
    """Of one run. `job` is the one that the workers were started with last."""

    def __init__(self, job: Job, memory: SharedMemory) -> None:
        self.job, self.memory = job, memory
        self._step = 0
        self._at: Counter[int] = Counter()  # deaths by place
        self._of: Counter[int] = Counter()  # and by the sphere that was computed
        self._servers = 0
        self._memory_kills = memory_kills()

    def count(self, ended: Ended, step: int) -> str:
        """A worker ended while the run was busy with `step`: what to tell.

        SphereLost where it said why it ended, or where one sphere has cost too many.
        """
        self._begin(step)
        text, starved = self._describe(ended, step)
        if not os.WIFSIGNALED(ended.status):
            raise SphereLost(text)
        if ended.with_server:
            return text
        self._at[ended.worker] += 1
        words = self.memory.worker_words()[ended.worker]
        sphere = int(words[M.W_SPHERE])
        unfinished = self.memory.sphere_words()[sphere, M.P_COMPLETE] != step
        if words[M.W_STATE] == M.State.COMPUTING and unfinished and not starved:
            self._of[sphere] += 1
            if self._of[sphere] >= MOST_DEATHS:
                raise SphereLost(
                    f"Sphere {sphere} ended {MOST_DEATHS} workers in step {step}: its shard cannot be computed here."
                    f" The last: {text}"
                )
        return text

    def count_server(self, how: str, step: int) -> str:
        """The process that starts the workers ended, and they with it. SphereLost at the third time within a step."""
        self._begin(step)
        self._servers += 1
        if self._servers >= MOST_DEATHS:
            raise SphereLost(f"The process that starts the workers {how}, {MOST_DEATHS} times within step {step}.")
        return f"The process that starts the workers {how}; its workers ended with it."

    def worn_out(self) -> int | None:
        """The place that has lost too many workers within this step, if there is one."""
        return next((worker for worker, deaths in self._at.items() if deaths >= MOST_DEATHS), None)

    def forget(self) -> None:
        """Count anew: other workers stand at other places now."""
        self._at.clear()

    def _begin(self, step: int) -> None:
        if step != self._step:
            self._step, self._servers = step, 0
            self._at.clear()
            self._of.clear()

    def _describe(self, ended: Ended, step: int) -> tuple[str, bool]:
        """In words, and whether the kernel says that memory was the cause."""
        said = self.memory.error(ended.worker)
        killed = False
        if os.WIFSIGNALED(ended.status):
            number = os.WTERMSIG(ended.status)
            killed = number == signal.SIGKILL
            how = f"ended by {signal_name(number)}"
        else:
            how = f"ended with exit code {os.waitstatus_to_exitcode(ended.status)}"
        text = f"{self.names(ended.worker)} (pid {ended.pid}) {how} while {self.state(ended.worker)}, step {step}."
        if said:
            text += f"\nIt said: {said}"
        before, self._memory_kills = self._memory_kills, memory_kills()
        kills = (self._memory_kills or 0) - (before or 0)
        starved = killed and kills > 0
        if not starved and "memory" not in said and "space" not in said:
            return text, False
        limit = memory_limit()
        text += (
            f"\nThe memory ran out{f', and the kernel ended {kills} of its processes' if starved else ''}."
            f" This run shares {size(self.memory.regions.total)}, {size(available_memory())} are available now"
            f"{'' if limit is None else f' of a limit of {size(limit)}'}. Try fewer --workers or --spheres."
        )
        return text, starved

    def state(self, worker: int) -> str:
        """What it says it does, or did."""
        return M.State(int(self.memory.worker_words()[worker, M.W_STATE])).name.lower()

    def names(self, worker: int) -> str:
        """ "spheres 1, 4 of worker 1" """
        spheres = list(hosted(worker, self.job.workers, self.job.spheres))
        names = ", ".join(map(str, spheres[:6])) + (", ..." if len(spheres) > 6 else "")
        return f"{'Sphere' if len(spheres) == 1 else 'Spheres'} {names} of worker {worker}"
