"""A job -> tokens/s, time by phase, memory and barrier latency of its spheres; and this machine's bandwidth."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numba
import numpy as np
import psutil

from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres.job import Job
from cllm_spheres.spheres.node_zero import NodeZero

PHASES = {
    "pack": M.W_PACK_NS, "compute": M.W_COMPUTE_NS, "gather": M.W_GATHER_NS, "update": M.W_UPDATE_NS,
    "waiting": M.W_WAIT_NS,
}  # fmt: skip
RATE = 1e-4  # a learning rate: the weights move, and stay finite
BARRIERS = 2000
BARRIERS_S = 0.5  # at most about this long


@dataclass(frozen=True)
class Point:
    """One measurement. Phases are seconds a step, mean over the workers."""

    workers: int
    spheres: int
    batch_size: int
    steps: int
    tokens_per_s: float
    step_s: float
    phases_s: dict[str, float]
    barrier_s: float
    pss_bytes: int


def measure(job: Job, seconds: float, status: Callable[[str], None]) -> Point:
    """Train for about `seconds` after a first step that takes the pages; then time barriers alone."""
    node = NodeZero(job, status)
    try:
        node.start()
        node.memory.doubles(node.memory.regions.rates, M.RING)[:] = RATE
        node.do(M.INITIALISE)
        node.set_position(0, 0)
        node.do(M.STEPS, 1, 2)
        began = time.perf_counter()
        node.do(M.STEPS, 2, 3)
        steps = min(M.RING, max(1, math.ceil(seconds / (time.perf_counter() - began))))
        before = node.memory.worker_words().copy()
        node.do(M.STEPS, 3, 3 + steps)
        spent = (node.memory.worker_words() - before)[: job.workers]
        records = node.memory.ring_words()
        step_s = (records[steps - 1, M.R_END_NS] - records[0, M.R_START_NS]) * 1e-9 / steps
        pss = sum(_pss(pid) for pid in (*node.pids.values(), node.server_pid))
        barrier_s = _barrier_s(node)
    finally:
        node.kill()
    phases = {name: float(spent[:, word].mean()) * 1e-9 / steps for name, word in PHASES.items()}
    tokens = job.batch_size * job.shape.block_size
    return Point(
        job.workers, job.spheres, job.batch_size, steps, tokens / step_s, step_s, phases, barrier_s, pss
    )  # fmt: skip


def _pss(pid: int) -> int:
    return int(psutil.Process(pid).memory_full_info().pss)


def _barrier_s(node: NodeZero) -> float:
    """Seconds of one barrier at which all arrive at once."""
    count = 20
    while True:
        began = time.perf_counter()
        node.do(M.MEET, 0, count)
        passed = time.perf_counter() - began
        if count >= BARRIERS or passed > BARRIERS_S / 4:
            return passed / count
        count = min(BARRIERS, 4 * count)


# --- the machine's bandwidth, to compare with ---


@numba.njit(nogil=True, fastmath={"reassoc"})
def _read(x):
    total = np.float32(0)
    for i in range(x.size):
        total += x[i]
    return total


@numba.njit(nogil=True)
def _triad(a, b, c):
    for i in range(a.size):
        a[i] = b[i] + np.float32(3) * c[i]


def bandwidth(cores: int, floats: int = 1 << 24, repeats: int = 5) -> dict[str, float]:
    """GB/s of reading and of a triad (a = b + 3 c, 12 bytes an element), by `cores` threads together; the best."""
    arrays = [[np.ones(floats, np.float32) for _ in range(3)] for _ in range(cores)]
    calls: dict[str, tuple[int, Callable[[list[np.ndarray]], object]]] = {
        "read": (4, lambda own: _read(own[1])), "triad": (12, lambda own: _triad(*own)),
    }  # fmt: skip
    found = {}
    with ThreadPoolExecutor(cores) as pool:
        for name, (size, call) in calls.items():
            list(pool.map(call, arrays))
            shortest = float("inf")
            for _ in range(repeats):
                began = time.perf_counter()
                list(pool.map(call, arrays))
                shortest = min(shortest, time.perf_counter() - began)
            found[name] = cores * size * floats / shortest * 1e-9
    return found
