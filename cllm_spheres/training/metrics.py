"""Finished steps in shared memory -> lines of metrics.jsonl, about ten times a second."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from cllm_spheres.errors import RunFailed
from cllm_spheres.events import LONGEST_LINE, dumps, event
from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres.node_zero import NodeZero
from cllm_spheres.training.footprint import Footprint

TELLS_AGAIN_S = 10.0  # that the disk refuses, and twice as long after each time
MOST_WAITING = 64_000_000  # bytes that may wait for a disk to take them again: hours of most runs


class Metrics:
    """Appends records to metrics.jsonl and counts the run's tokens; any thread may write.

    What a full disk does not take waits in memory, and is written when it can be.
    """

    def __init__(
        self, path: Path, *, status: Callable[[str], None] = lambda text: None, said: Callable[[str], str] = str
    ) -> None:
        """status: told when the disk refuses, and "" when it takes again. said: makes paths in events readable."""
        self.path = path
        self._said = said
        self._status, self._refused = status, ""
        self._told_at, self._tell_after_s = 0.0, 0.0
        self._waiting = bytearray()
        self._lock = threading.Lock()
        self.total_tokens = 0
        self.skipped = 0
        self._previous_end_ns = time.monotonic_ns()
        try:
            self._file = path.open("a+b", buffering=0)
            size = self._file.seek(0, 2)
            start = self._file.seek(max(0, size - LONGEST_LINE))
            if not (end := self._file.read()).endswith(b"\n"):  # a line torn by a death, or by a full disk
                self._file.truncate(start + end.rfind(b"\n") + 1)
        except OSError as error:
            raise RunFailed(f"{path} cannot be written: {error.strerror}.") from None

    def write(self, *records: dict[str, Any]) -> None:
        """Append records."""
        with self._lock:
            self._waiting += "".join(dumps(record) + "\n" for record in records).encode()
            self._flush()

    def check(self) -> None:
        """RunFailed where so many lines wait that the disk will hardly take them any more."""
        if len(self._waiting) > MOST_WAITING:
            raise RunFailed(self._refusal())

    def finish(self) -> None:
        """The last try. RunFailed where lines are lost."""
        with self._lock:
            self._flush()
            if self._waiting:
                raise RunFailed(self._refusal())

    def _flush(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            self._refused = error.strerror or str(error)
            if time.monotonic() - self._told_at >= self._tell_after_s:
                self._told_at, self._tell_after_s = time.monotonic(), max(TELLS_AGAIN_S, 2 * self._tell_after_s)
                self._status(self._refusal())
        if self._refused and not self._waiting:
            self._refused, self._tell_after_s = "", 0.0
            self._status("")

    def _refusal(self) -> str:
        lines = self._waiting.count(b"\n")
        return f"{self.path} cannot be written: {self._refused}. {lines:,} lines wait in memory."

    def event(self, name: str, message: str, step: int, **fields: Any) -> None:
        """Append an event; where the disk refuses it, its message is told like a status."""
        fields = {key: self._said(value) if isinstance(value, str) else value for key, value in fields.items()}
        self.write(event(name, self._said(message), step=step, time=time.time(), **fields))
        if self._refused:
            self._status(message)

    def start_clock(self) -> None:
        """The next step's `seconds` count from now."""
        self._previous_end_ns = time.monotonic_ns()

    def steps(self, node_zero: NodeZero, after: int) -> int:
        """Write the steps of the last command that are done, after step `after`; the last one done."""
        done, first = node_zero.done, node_zero.base
        if done <= after:
            return after
        words, doubles = node_zero.memory.ring_words(), node_zero.memory.ring_doubles()
        tokens = node_zero.job.batch_size * node_zero.job.shape.block_size
        per_worker = 1e-9 / node_zero.job.workers
        packs = node_zero.memory.sizes.pack_units > 0
        lines = []
        for step in range(after + 1, done + 1):
            w, d = words[step - first].tolist(), doubles[step - first].tolist()
            seconds = (w[M.R_END_NS] - self._previous_end_ns) * 1e-9
            before = (w[M.R_START_NS] - self._previous_end_ns) * 1e-9
            self._previous_end_ns = w[M.R_END_NS]
            pack, compute, gather, update = (
                w[word] * per_worker for word in (M.R_PACK_SUM, M.R_COMPUTE_SUM, M.R_GATHER_SUM, M.R_UPDATE_SUM)
            )
            # Means over the workers; the rest is waiting. Some may begin before the step's start, which worker 0 sets.
            rest = max(0.0, seconds - (pack + compute + gather + update))
            other = min(max(0.0, before), rest)
            self.total_tokens += tokens
            lines.append({
                "kind": "step", "step": step, "loss": d[M.R_LOSS], "cross_entropy": d[M.R_CROSS_ENTROPY],
                "lr": d[M.R_LR], "grad_norm": d[M.R_NORM],
                "clipped_norm": d[M.R_CLIPPED], "tokens": tokens, "total_tokens": self.total_tokens,
                "time": w[M.R_REAL_NS] * 1e-9, "seconds": seconds, "tokens_per_s": tokens / seconds,
                "compute_s": compute, "waiting_s": rest - other, "gather_s": gather, "update_s": update,
                "other_s": other, **({"pack_s": pack} if packs else {}),
            })  # fmt: skip
            if w[M.R_SKIPPED]:
                self.skipped += 1
                lines.append(event(
                    "skip", f"Step {step} was skipped: its gradient was not finite (loss {d[M.R_LOSS]});"
                    f" {self.skipped} skipped so far.", step=step, time=w[M.R_REAL_NS] * 1e-9, skipped=self.skipped,
                ))  # fmt: skip
        self.write(*lines)
        return done


class SphereSampler:
    """About once a second: throughput, waiting, state and memory of each sphere since the sample before."""

    def __init__(self, node_zero: NodeZero, interval_s: float = 1.0) -> None:
        self._node_zero = node_zero
        self._interval_s = interval_s
        self._time = time.monotonic()
        self._footprint = Footprint()
        self._find_processes()
        self._before = node_zero.statistics()

    def _find_processes(self) -> None:
        self._pids = self._node_zero.pids
        self._all = []
        for pid in (os.getpid(), self._node_zero.server_pid, *self._pids.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                self._all.append(psutil.Process(pid))
        self._cpu_s = self._cpu_seconds()

    def _cpu_seconds(self) -> float:
        total = 0.0
        for process in self._all:
            try:
                times = process.cpu_times()
                total += times.user + times.system
            except psutil.Error:
                pass  # it has just ended
        return total

    def sample(self, step: int) -> dict[str, Any] | None:
        """A record of kind "spheres", or None where the last one is younger than the interval."""
        now = time.monotonic()
        passed = now - self._time
        if passed < self._interval_s:
            return None
        if self._node_zero.pids != self._pids:  # some were replaced
            self._find_processes()
        job, after, before = self._node_zero.job, self._node_zero.statistics(), self._before
        cpu_s = self._cpu_seconds()
        spent = after["workers"] - before["workers"]
        busy = spent[:, [M.W_PACK_NS, M.W_COMPUTE_NS, M.W_GATHER_NS, M.W_UPDATE_NS]].sum(axis=1)
        waited = spent[:, M.W_WAIT_NS]
        share = np.where(busy + waited > 0, waited / np.maximum(busy + waited, 1), 0.0)
        taken = self._footprint.update(process.pid for process in self._all)
        shared = os.fstat(self._node_zero.memory.descriptor).st_blocks * 512
        own = {worker: taken.get(pid, 0) for worker, pid in self._pids.items()}
        worker = [sphere % job.workers for sphere in range(job.spheres)]
        tokens = (after["spheres"] - before["spheres"])[:, M.P_TOKENS]
        segment = self._node_zero.memory.regions.stride
        record = {
            "kind": "spheres", "step": step, "time": time.time(), "worker": worker,
            "throughput": [round(float(t) / passed, 1) for t in tokens],
            "waiting": [round(float(share[w]), 4) for w in worker],
            "state": [M.State(int(after["workers"][w, M.W_STATE])).name.lower() for w in worker],
            "memory": [segment + own.get(w, 0) // max(1, -(-(job.spheres - w) // job.workers)) for w in worker],
            "cpu_percent": round(100 * (cpu_s - self._cpu_s) / passed, 1),
            "memory_bytes": shared + sum(taken.values()),
        }  # fmt: skip
        self._time, self._cpu_s, self._before = now, cpu_s, after
        return record
