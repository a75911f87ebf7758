"""A preset with its spheres and workers -> a job without text, and findings: what it needs, against what is there."""

from __future__ import annotations

import contextlib
import os
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

from cllm_spheres import caches, limits
from cllm_spheres.config import Config, merge
from cllm_spheres.doctor.finding import Answer
from cllm_spheres.errors import InputError
from cllm_spheres.machine import available_memory, usable_cores
from cllm_spheres.model import dtypes
from cllm_spheres.model.layout import Layout
from cllm_spheres.spheres.job import Job
from cllm_spheres.training import start
from cllm_spheres.training.plan import AGAIN, EVAL_BATCHES, check_shape, fit, memory_bytes, places, shape_of
from cllm_spheres.units import size


def plan(options: dict[str, object]) -> tuple[Config, Job]:
    """What `train` would make of these options, with the preset's vocabulary. InputError for what cannot be."""
    config, given = merge(options)
    return config, job_of(config, given)


def job_of(config: Config, given: set[str]) -> Job:
    """The job of a configuration, without a text. given: the options that the user set himself."""
    check_shape(config)
    values = config.model_dump() | places(config, given)
    values["dtype"] = dtypes.choose(config.dtype, config.width)
    values["ff_width"] = config.ff_width or 4 * config.width
    resolved = Config(**values)
    assert resolved.batch_size and resolved.spheres and resolved.workers
    job = Job(
        shape=shape_of(resolved), batch_size=resolved.batch_size, spheres=resolved.spheres, workers=resolved.workers,
        seed=resolved.seed, train="", val="", item_bytes=2, train_tokens=0, val_tokens=0,
        num_windows=EVAL_BATCHES * resolved.batch_size, optimizer=resolved.optimizer, dropout=resolved.dropout,
        dtype=resolved.dtype,
    )  # fmt: skip
    return fit(job, resolved.recompute)


def look_at_run(config: Config, job: Job) -> Answer:
    """The run that the other findings speak of, and what would make it slow."""
    found = (
        f"preset {config.preset}: {Layout(job.shape).num_parameters:,} parameters,"
        f" {job.spheres} sphere{'s' * (job.spheres > 1)} on"
        f" {job.workers} worker{'s' * (job.workers > 1)}, batch {job.batch_size} x {job.shape.block_size} tokens,"
        f" {dtypes.describe(job.dtype)}{AGAIN[job.recompute]}"
    )
    notes = start.slow(job, config.dtype)
    return ("note", found, " ".join(notes)) if notes else ("ok", found)


def look_at_memory(job: Job) -> Answer:
    """Memory of the run, against what is available."""
    needed, available = memory_bytes(job), available_memory()
    found = f"this run takes {size(needed)}, {size(available)} are available"
    if needed > available:
        return "bad", found, "Fewer --spheres, fewer --workers, or a smaller --preset; or end other programs."
    return "ok", found


def _or_refusal(check: Callable[[], None], found: str) -> Answer:
    """The answer "ok", or "bad" with what `train` would say."""
    try:
        check()
    except InputError as error:
        return "bad", found, str(error)
    return "ok", found


def look_at_files(job: Job) -> Answer:
    """Open files that Node Zero needs, against the limit."""
    soft, hard = limits.read(resource.RLIMIT_NOFILE)
    needed = start.files_needed(job.workers, len(usable_cores()))
    found = f"a process of this run opens up to {needed}; allowed are {_count(soft)}, at most {_count(hard)}"
    return _or_refusal(lambda: start.check_files(job), found)


def look_at_tasks(job: Job) -> Answer:
    """Processes of a run, against the user's limit and the control group's."""
    needed = start.tasks_needed(job)
    left = limits.tasks_left(needed)
    rest = "there is no limit" if left is None else f"{max(0, left[0]):,} more are allowed by {left[1]}"
    return _or_refusal(lambda: start.check_tasks(job), f"this run starts {needed} processes and threads; {rest}")


def look_at_address_space(job: Job) -> Answer:
    """What a process maps, against RLIMIT_AS."""
    most = limits.read(resource.RLIMIT_AS)[0]
    found = f"a process of this run maps {size(start.address_bytes(job))}; {_count(most and size(most))}"
    return _or_refusal(lambda: start.check_address_space(job), found + (" are allowed" if most else ""))


def _count(number: object) -> str:
    return "there is no limit" if number is None else f"{number:,}" if isinstance(number, int) else str(number)


def look_at_run_folder(run: Path, job: Job) -> Answer:
    """Whether checkpoints can be written, and how many of them fit."""
    folder, needed = limits.existing(run), start.checkpoint_bytes(job)
    free = limits.free_bytes(folder)
    found = f"{run} (in {folder}): a checkpoint takes {size(needed)}, {size(free)} are free"
    try:
        notes = start.check_disk(run, needed)
        _write_something(folder)
    except InputError as error:
        return "bad", found, str(error)
    except OSError as error:
        return "bad", found, f"Nothing can be written there: {error.strerror}. Give another --run."
    return ("note", found, " ".join(notes)) if notes else ("ok", found)


def look_at_temporary_folder() -> Answer:
    """The folder for scratch files."""
    try:
        folder = Path(tempfile.gettempdir())
        _write_something(folder)
    except OSError as error:
        return "bad", f"no scratch file can be written: {error.strerror or error}", "Let TMPDIR name another folder."
    return "ok", f"{folder} is writable, {size(limits.free_bytes(folder))} free"


def look_at_text_cache() -> Answer:
    """Where text that `train` prepares by itself is kept."""
    top = caches.folder()
    if top is None:
        return (
            "bad", f"prepared text cannot be kept: {caches.problem(caches.wanted())}",
            "Let XDG_CACHE_HOME name a folder that you may write to. Or prepare the text into a folder of your own"
            " (cllm-spheres prepare PATH --out DIR) and train on that.",
        )  # fmt: skip
    folder = top / "prepared"
    place = limits.existing(folder)
    if reason := limits.unwritable(place):
        return "bad", f"{folder} cannot be written: {reason}", "Make it writable, or let XDG_CACHE_HOME name another."
    return _lasting(top, f"{folder} is writable, {size(limits.free_bytes(place))} free")


def _lasting(top: Path, found: str) -> Answer:
    """The answer on a cache that can be used: to be noted where it is not the one that lasts."""
    if top == caches.wanted():
        return "ok", found
    return (
        "note", f"{found}; {caches.problem(caches.wanted())}",
        "The temporary folder may be emptied: let XDG_CACHE_HOME name a folder that lasts and that you may write to.",
    )  # fmt: skip


def look_at_kernel_cache() -> Answer:
    """Where compiled kernels are kept, and how much they take."""
    from cllm_spheres.crystal import jit

    folder = jit.CACHE_FOLDER
    if folder.parent.name != "kernels":
        return (
            "note", f"{folder} for this process alone: {caches.problem(caches.wanted())}, and"
            f" {tempfile.gettempdir()} cannot keep them either",
            "Every start compiles for half a minute. Let XDG_CACHE_HOME name a folder that you may write to.",
        )  # fmt: skip
    try:
        _write_something(folder)
    except OSError as error:
        advice = "Free some space, or let XDG_CACHE_HOME name another folder."
        return "bad", f"nothing can be written into {folder}: {error.strerror}", advice
    own, all_of_them = _bytes_below(folder), _bytes_below(folder.parent)
    found = f"{folder} is writable and holds {size(own)}, {size(all_of_them)} with those of other versions"
    free = limits.free_bytes(folder)
    if jit.is_cold("fp32") and free is not None and free < 20_000_000:
        return "bad", f"{found}; {size(free)} are free", "The compiled kernels take about 10 MB: free some space."
    return _lasting(folder.parent.parent, found)


def _write_something(folder: Path) -> None:
    """A file, written and removed. OSError where that fails."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"doctor")
        file.flush()


def _bytes_below(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # removed meanwhile
                total += os.lstat(os.path.join(place, name)).st_size
    return total
