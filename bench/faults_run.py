"""A run under way -> who of it is killed at random moments, how soon it goes on, and what it holds meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil

from cllm_spheres.errors import RunFailed
from cllm_spheres.events import Tail
from cllm_spheres.training.launch import Launch

SERVER_SHARE = 0.1  # of the kills: the process that starts the workers, and all workers with it
RECOVERS_WITHIN_S = 300.0  # longer than a hang takes to be noticed


@dataclass(frozen=True)
class Kill:
    """One SIGKILL. seconds: until the event that says that all is replaced and the step goes on."""

    victim: str  # "worker" or "server"
    state: str  # what a worker that died was doing
    seconds: float


@dataclass(frozen=True)
class Sample:
    """What the processes of a run hold at a time (seconds since the beginning)."""

    at_s: float
    memory_bytes: int  # resident and not shared, of all of them
    descriptors: int  # of Node Zero and the server
    threads: int  # of Node Zero
    processes: int


class Disturber:
    """Kills processes of one run, one after another has been recovered from."""

    def __init__(self, launch: Launch, rng: random.Random) -> None:
        self.launch, self.rng = launch, rng
        self.node_zero = psutil.Process(launch.process.pid)
        self._tail = Tail(launch.plan.run / "metrics.jsonl")
        self._began = time.monotonic()

    def family(self) -> tuple[psutil.Process | None, list[psutil.Process]]:
        """The server and the workers that live now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in self.node_zero.children():
                return child, child.children()
        return None, []

    def wait_for_step(self) -> bool:
        """Until a step has become whole from now on; False where the run ended before."""
        return any(record["kind"] == "step" for record in self._records())

    def kill(self) -> Kill | None:
        """Kill somebody; returns when the run goes on. None where it had ended, or ended before it had to recover."""
        server, workers = self.family()
        if server is None or not workers:
            return None
        victim = server if self.rng.random() < SERVER_SHARE else self.rng.choice(workers)
        killed_at, state = time.time(), "unknown"
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGKILL)
        for record in self._records():
            if record.get("event") == "lost" and (match := re.search(r"while (\w+),", record["message"])):
                state = match[1]
            if record.get("event") == "recovered":
                return Kill("server" if victim is server else "worker", state, record["time"] - killed_at)
        return None

    def _records(self) -> Iterator[dict[str, Any]]:
        """Records as they come, until the run ends."""
        deadline = time.monotonic() + RECOVERS_WITHIN_S
        while self.launch.alive:
            yield from self._tail.read()
            time.sleep(0.001)
            if time.monotonic() > deadline:
                raise RunFailed(f"{self.launch.plan.run} did not go on within {RECOVERS_WITHIN_S:.0f} s.")

    def sample(self) -> Sample | None:
        """What the run holds now; None while somebody is being replaced."""
        server, workers = self.family()
        if server is None:
            return None
        try:
            infos = [process.memory_info() for process in (self.node_zero, server, *workers)]
            return Sample(
                time.monotonic() - self._began, sum(info.rss - info.shared for info in infos),
                self.node_zero.num_fds() + server.num_fds(), self.node_zero.num_threads(), 2 + len(workers),
            )  # fmt: skip
        except psutil.NoSuchProcess:
            return None
