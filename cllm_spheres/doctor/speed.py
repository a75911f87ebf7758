"""A job -> tokens/s that one core computes of it in each dtype, measured in about a second."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from cllm_spheres.doctor.finding import Answer
from cllm_spheres.kernels.sizes import BLOCK
from cllm_spheres.machine import available_memory
from cllm_spheres.model import dtypes
from cllm_spheres.model.workspace import Workspace
from cllm_spheres.spheres.job import Job
from cllm_spheres.units import compact, size

LEAST_S = 0.4  # of measuring, in each dtype
MUCH = 1.15  # times as fast: less than that is the noise of a machine that does other things too


def rehearsal_bytes(job: Job) -> int:
    """Memory that `tokens_per_s` takes: weights, a segment, the arena, packed weights."""
    return 8 * job.layout.size + job.programs["train"].arena_bytes + dtypes.packing(job.layout, job.dtype).size_bytes


def tokens_per_s(job: Job) -> float:
    """Of whole batches on one core: the gradient of every sequence, and the weights packed once a step."""
    layout, rng = job.layout, np.random.default_rng(5)
    params_P = np.tile((rng.standard_normal(BLOCK) * 0.02).astype(np.float32), layout.num_blocks)
    for placed, view in zip(layout.tensors, layout.views(params_P).values(), strict=True):
        if view.ndim == 1:
            view[...] = placed.tensor.constant
    segment_P = np.zeros(layout.size, np.float32)
    workspace = Workspace(layout, params_P, job.dtype, largest_shard=job.largest_shard, recompute=job.recompute)
    count, length = job.largest_shard, job.shape.block_size
    inputs, targets = rng.integers(0, job.shape.vocab_size, (2, count, length)).astype(np.int32)

    def shard() -> None:
        workspace.shard(inputs, targets, segment_P, 1 / (count * length))

    workspace.pack()
    began = time.perf_counter()
    shard()  # takes the pages too
    warm_s = time.perf_counter() - began
    shard_s = min(_seconds(shard), warm_s)
    step_s = shard_s * job.batch_size / count + (_seconds(workspace.pack) if workspace.packing.units else 0.0)
    return job.batch_size * length / step_s


def _seconds(work: object) -> float:
    """Of one call: the shortest of as many as fit into LEAST_S, at least one."""
    assert callable(work)
    shortest, end = float("inf"), time.perf_counter() + LEAST_S
    while time.perf_counter() < end or shortest == float("inf"):
        began = time.perf_counter()
        work()
        shortest = min(shortest, time.perf_counter() - began)
    return shortest


def look_at_speed(job: Job) -> Answer:
    """Every dtype that this CPU has, measured; a note where another than the job's is clearly faster."""
    jobs = [replace(job, dtype=dtype) for dtype in dtypes.DTYPES if dtypes.usable(dtype) == dtype]
    needed, available = max(map(rehearsal_bytes, jobs)), available_memory()
    if needed > available:
        return "note", f"not measured: that takes {size(needed)}, {size(available)} are available", "Free some memory."
    rates = {one.dtype: tokens_per_s(one) for one in jobs}
    fastest = max(rates, key=lambda dtype: rates[dtype])
    found = "tokens/s of a core: " + ", ".join(f"{dtype} {compact(rate)}" for dtype, rate in rates.items())
    found += f"; this run takes {job.dtype}"
    if rates[fastest] > MUCH * rates[job.dtype]:
        return "note", found, f"--dtype {fastest} is {rates[fastest] / rates[job.dtype]:.1f} times as fast here."
    return "ok", found
