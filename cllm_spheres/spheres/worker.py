"""A job and the shared memory -> a worker that computes until it is told to end.

A worker is forked from the warmed server. It never prints and ignores signals: Node Zero alone acts on them.
"""

from __future__ import annotations

import os
import traceback
from pathlib import Path

import numpy as np

from cllm_spheres.kernels.optimizer import commit_block, update_block
from cllm_spheres.kernels.sizes import BLOCK, SLOT_FLOATS
from cllm_spheres.kernels.soft_targets import card
from cllm_spheres.model import dtypes
from cllm_spheres.model import record as R
from cllm_spheres.model.arena import new_arena
from cllm_spheres.model.initialise import initial_tables
from cllm_spheres.model.run import compute_shard
from cllm_spheres.model.shape import Shape
from cllm_spheres.model.workspace import Registers
from cllm_spheres.spheres import engine
from cllm_spheres.spheres.context import Context
from cllm_spheres.spheres.job import OPTIMIZERS, Job
from cllm_spheres.spheres.memory import W_PROGRESS, WORKER_WORDS, SharedMemory
from cllm_spheres.spheres.topology import hosted, span

SPIN = 2000  # pauses at a barrier before sleeping, about 50 us; none where workers outnumber cores


class Worker:
    """Everything that `engine.work` needs, kept alive while it runs."""

    def __init__(self, job: Job, memory: SharedMemory, worker: int) -> None:
        layout, regions, packing = job.layout, memory.regions, dtypes.packing(job.layout, job.dtype)
        places, values = initial_tables(layout)
        first_block, last_block = span(worker, job.workers, layout.num_blocks)
        sequence_tokens = job.largest_shard * job.shape.block_size
        train = np.memmap(job.train, np.uint8, "r") if job.trains else np.zeros(8, np.uint8)
        val = np.memmap(job.val, np.uint8, "r") if job.num_windows else np.zeros(8, np.uint8)
        inputs, targets = np.zeros(sequence_tokens, np.int32), np.zeros(sequence_tokens, np.int32)
        arena, block_sum = new_arena(job.arena_bytes // 4), new_arena(BLOCK)
        constants = np.array([job.clip, job.beta1, job.beta2, job.weight_decay], np.float64)
        base = memory.address
        table = base + regions.soft_targets
        soft = card(job.alpha, job.neighbours, table, table + 4 * memory.sizes.soft_targets)
        self.registers = {purpose: Registers(one, arena) for purpose, one in job.programs.items()}
        progress = base + regions.workers + 8 * (worker * WORKER_WORDS + W_PROGRESS)
        for one in self.registers.values():
            one.words[R.PARAMS], one.words[R.FROZEN] = base + regions.params, base + regions.frozen
            one.words[R.PACKED], one.words[R.PROGRESS] = base + regions.packed, progress
            one.words[R.INPUTS], one.words[R.TARGETS] = inputs.ctypes.data, targets.ctypes.data
            one.words[R.SOFT] = soft.ctypes.data if job.alpha > 0 else 0
        values_by_name = dict(
            worker=worker, num_workers=job.workers, num_spheres=job.spheres,
            first_block=first_block, last_block=last_block, num_blocks=layout.num_blocks,
            decaying_blocks=layout.decaying_blocks, spin=SPIN if job.cores else 0,
            batch_size=job.batch_size, block_size=job.shape.block_size, seed=job.seed,
            optimizer=OPTIMIZERS.index(job.optimizer), skip_nonfinite=job.skip_nonfinite,
            has_dropout=job.dropout > 0, stride=regions.stride, item_bytes=job.item_bytes,
            train_tokens=job.train_tokens, val_tokens=job.val_tokens, num_tensors=len(places),
            control=base + regions.control, decision=base + regions.decision, workers=base + regions.workers,
            spheres=base + regions.spheres, ring=base + regions.ring, rates=base + regions.rates,
            window_starts=base + regions.window_starts, window_lengths=base + regions.window_lengths,
            window_firsts=base + regions.window_firsts, window_losses=base + regions.window_losses,
            window_hits=base + regions.window_hits, norms=base + regions.norms, updated=base + regions.updated,
            layers=job.shape.layers,
            backward_layers=job.programs["train"].backward_layers if job.trains else 0,
            num_faults=len(job.faults), faults=base + regions.faults,
            slots=base + regions.slots, slot=base + regions.slots + worker * SLOT_FLOATS * 4,
            params=base + regions.params, moments=base + regions.moments, squares=base + regions.squares,
            gradient=base + regions.gradient, segments=base + regions.segments, packed=base + regions.packed,
            frozen=base + regions.frozen, pack_units=packing.units, frozen_units=packing.frozen_units,
            keeps_sum=memory.sizes.keeps_sum, block_sum=block_sum.ctypes.data,
            train=train.ctypes.data, val=val.ctypes.data, inputs=inputs.ctypes.data, targets=targets.ctypes.data,
            places=places.ctypes.data, values=values.ctypes.data, constants=constants.ctypes.data,
            shard=self.registers["train"].address if job.trains else 0,
            window=self.registers["evaluate"].address,
            trace=base + regions.traces + worker * regions.trace_stride if job.trace_marks else 0,
            pack_unit=packing.entry.address if packing.entry else 0, pack_table=packing.address,
        )  # fmt: skip
        if job.trace_marks:
            memory.trace_words(worker)[1] = job.trace_marks
        self.context = np.array([values_by_name[field.name.lower()] for field in Context], np.int64)
        self._keep = packing, places, values, train, val, inputs, targets, arena, block_sum, constants, soft, memory

    def run(self) -> None:
        """Obey commands until EXIT."""
        engine.work.call(self.context.ctypes.data)


def allocate_own_ranges(job: Job, memory: SharedMemory, worker: int) -> None:
    """Take the pages of this worker's segments and of its span, on its own NUMA node. OSError where there are none."""
    regions, flat = memory.regions, memory.regions.stride
    for sphere in hosted(worker, job.workers, job.spheres) if job.trains else ():
        memory.allocate(regions.segments + sphere * flat, flat)
    first, last = span(worker, job.workers, memory.sizes.num_parameters // BLOCK)
    start, size = first * 4 * BLOCK, (last - first) * 4 * BLOCK
    owned = [regions.params]
    owned += [regions.moments] if job.trains else []
    owned += [regions.squares] if memory.sizes.has_squares else []
    owned += [regions.gradient] if memory.sizes.keeps_sum else []
    for region in owned:
        memory.allocate(region + start, size)
    # Units of packing need not be equally large: an even share of their bytes, rounded out to pages.
    first, last = span(worker, job.workers, memory.sizes.packed_bytes)
    memory.allocate(regions.packed + first, last - first)


def main(job: Job, descriptor: int, worker: int) -> int:
    """A forked worker's whole life; the exit code is 0, or 1 with the reason in shared memory."""
    memory = SharedMemory(job.sizes, descriptor)
    try:
        if job.cores:
            os.sched_setaffinity(0, {job.cores[worker]})
        allocate_own_ranges(job, memory, worker)
        Worker(job, memory, worker).run()
    except OSError as error:
        memory.set_error(worker, f"{error.strerror} while starting")
        return 1
    except Exception:
        memory.set_error(worker, traceback.format_exc())
        return 1
    return 0


def warm(scratch: Path, dtype: str) -> None:
    """Run a tiny step, so that everything is compiled, loaded and initialised before the first fork.

    scratch: a file of at least 64 bytes to stand in for a corpus. dtype: "fp32" or "bf16".
    """
    shape = Shape(vocab_size=8, block_size=4, layers=1, heads=1, width=8, ff_width=8)
    job = Job(
        shape=shape, batch_size=1, spheres=1, workers=1, seed=0, train=str(scratch), val=str(scratch), item_bytes=2,
        train_tokens=8, val_tokens=8, num_windows=0, dtype=dtype,
    )  # fmt: skip
    memory = SharedMemory(job.sizes)
    tiny = Worker(job, memory, 0)
    x = {field.name.lower(): int(tiny.context[field]) for field in Context}
    words = tiny.registers["train"].words
    words[R.COUNT], words[R.LENGTH], words[R.SEGMENT] = 1, 4, x["segments"]
    compute_shard.call(x["shard"])
    update_block.call(
        0, x["constants"], x["segments"], x["params"], x["moments"], x["squares"], x["slot"], 0, 1
    )  # its result is never committed
    commit_block.call(0, x["params"], x["moments"], x["squares"], x["slot"], 0)
