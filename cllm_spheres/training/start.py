"""A job and this machine -> an InputError where the run cannot work here, and sentences on what will make it slow.

Light enough to precede every run: nothing is compiled, nothing is written.
"""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

from cllm_spheres import limits
from cllm_spheres.config import Config
from cllm_spheres.crystal import cpu
from cllm_spheres.errors import InputError
from cllm_spheres.machine import allowed_cores, available_memory, cpu_quota, usable_cores
from cllm_spheres.spheres.job import Job
from cllm_spheres.spheres.memory import Regions
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.training.plan import check_memory, fit, make_job, memory_bytes
from cllm_spheres.units import size

# Open files, counted in /proc/PID/fd. Node Zero: 16, one a worker, one for each core
# that it holds; while it chooses cores it holds all that are usable for a moment. The server: 7 and one a worker.
# The rest of the 40 is head-room for a checkpoint being written and for a second server after a loss.
FILES = 40
# Processes and threads besides the workers: Node Zero's 7, the server, one that compiles beside it, the command's 4.
TASKS = 14
SMALL_FILES_BYTES = 100_000  # of a checkpoint besides tensors and tokenizer, at most


def check_start(config: Config, prepared: Prepared, run: Path, *, resume: bool = False) -> tuple[str, ...]:
    """Sentences on what will be slow or scarce; InputError with the numbers where the run cannot work here."""
    job = fit(make_job(config, prepared), config.recompute)
    check_memory(job, resume=resume)
    check_files(job)
    check_tasks(job)
    check_address_space(job)
    tokenizer = prepared.folder / "tokenizer.json"
    needed = checkpoint_bytes(job) + (tokenizer.stat().st_size if tokenizer.exists() else 0)
    return (*slow(job, config.dtype), *check_disk(run, needed))


def check_workers(workers: object, job: Job) -> None:
    """InputError where a run that goes on cannot have so many workers."""
    if not isinstance(workers, int) or not 1 <= workers <= job.spheres:
        raise InputError(f"--workers {workers}: this run has {job.spheres} spheres, and takes 1 to {job.spheres}.")
    if workers <= job.workers:
        return
    wished = replace(job, workers=workers)
    check_files(wished)
    check_tasks(replace(job, workers=workers - job.workers))
    more, available = memory_bytes(wished) - memory_bytes(job), available_memory()
    if more > available:
        raise InputError(
            f"Not enough memory: {workers} workers need {size(more)} more than {job.workers}, {size(available)} are"
            " available. Try fewer --workers."
        )


def files_needed(workers: int, cores: int) -> int:
    """Descriptors that Node Zero may have open at once; no other process of a run has more."""
    return FILES + (workers if workers > cores else max(cores, 2 * workers))


def check_files(job: Job) -> None:
    """InputError where the hard limit of open files is too low; the soft one is raised when Node Zero is started."""
    cores, most = len(usable_cores()), limits.most_files()
    needed = files_needed(job.workers, cores)
    if most is None or needed <= most:
        return
    fitting = [workers for workers in range(1, job.workers) if files_needed(workers, cores) <= most]
    fewer = f" Or try {_fewer(job, fitting[-1])}." if fitting else ""
    raise InputError(
        f"Too few open files: {_workers(job)} {'need' if job.workers > 1 else 'needs'} up to {needed} in one process,"
        f" and {most} are allowed (ulimit -Hn). Raise the limit to {needed} or more: nofile in"
        f" /etc/security/limits.conf, LimitNOFILE= of systemd, --ulimit nofile={needed} of docker run.{fewer}"
    )


def tasks_needed(job: Job) -> int:
    """Processes and threads of a run."""
    return job.workers + TASKS


def check_tasks(job: Job) -> None:
    """InputError where so many processes may not be started."""
    needed = tasks_needed(job)
    left = limits.tasks_left(needed)
    if left is None or needed <= left[0]:
        return
    fitting = left[0] - TASKS
    fewer = f", or try {_fewer(job, fitting)}" if fitting >= 1 else ""
    raise InputError(
        f"Too few processes: {_workers(job)} and their helpers are {needed}, and {max(0, left[0])} more are allowed by"
        f" {left[1]}. Raise that limit, end other programs{fewer}."
    )


def address_bytes(job: Job) -> int:
    """What a process of a run maps, at least."""
    return Regions(job.sizes).total + job.arena_bytes + limits.ADDRESS_BYTES


def check_address_space(job: Job) -> None:
    """InputError where a process may not map what it needs, or shared memory may not be as large as it must."""
    limits.check_address_space(address_bytes(job))
    limits.check_file_size(Regions(job.sizes).total)


def checkpoint_bytes(job: Job) -> int:
    """Of weights, moments and small files."""
    return job.layout.num_parameters * 4 * (3 if job.optimizer == "adamw" else 2) + SMALL_FILES_BYTES


def check_disk(run: Path, needed: int) -> list[str]:
    """A sentence where only one checkpoint of `needed` bytes fits; InputError where none does or may be written."""
    folder = limits.existing(run)
    if reason := limits.unwritable(folder):
        raise InputError(f"The run cannot be written: {reason}. Give another --run, or make that one writable.")
    inside = run / "checkpoints"
    if inside.is_dir() and (reason := limits.unwritable(inside)):
        raise InputError(f"No checkpoint can be written: {reason}. Make it writable.")
    free = limits.free_bytes(folder)
    if free is None or free >= 2 * needed:
        return []
    if free < needed:
        raise InputError(
            f"Too little disk space: one checkpoint takes {size(needed)}, {size(free)} are free in {folder}."
            " Free some, or give a --run on another disk."
        )
    return [
        f"The disk has room for one checkpoint of {size(needed)} and no second: {size(free)} are free in {folder}."
        " A run keeps --keep of them and the best."
    ]


def slow(job: Job, dtype: str) -> list[str]:
    """Sentences on what costs speed and never bits. dtype: what was asked for."""
    notes = []
    cores, quota, allowed = len(usable_cores()), cpu_quota(), len(allowed_cores())
    if job.workers > cores:
        notes.append(
            f"{_workers(job)} share {cores} core{'s' * (cores > 1)}: the same bits, at the speed of {cores}."
            f" --workers {cores} with the same --spheres and --batch-size is as fast and takes less memory."
        )
    if quota is not None and quota < allowed:
        notes.append(
            f"The control group's quota is {quota:g} of {allowed} cores: {cores} {'are' if cores > 1 else 'is'} used."
            " Raise the quota for more speed."
        )
    if dtype == "bf16" and job.dtype != "bf16":
        notes.append("bf16 was asked for and this CPU has no bfloat16 arithmetic: float32 is computed instead.")
    if not has_vectors():
        notes.append("This CPU has neither AVX2 nor AVX-512: the kernels are several times slower here.")
    return notes


def has_vectors() -> bool:
    """Whether this CPU has the vectors without which the kernels are slow: AVX2, or what aarch64 always has."""
    return platform.machine() != "x86_64" or cpu.has(*cpu.LEVELS["avx2"].needs)


def _fewer(job: Job, workers: int) -> str:
    """Options that compute the same bits on fewer workers."""
    return f"--workers {workers}" + (f" --spheres {job.spheres}" if job.trains else "")


def _workers(job: Job) -> str:
    return f"{job.workers} worker{'s' * (job.workers > 1)}"
