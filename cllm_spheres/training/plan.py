"""Options, prepared text and this machine -> a resolved `Config` in which nothing is left open, or an InputError.

What contradicts itself is refused here, and what this machine cannot run in start.py, before anything is written.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from cllm_spheres.config import MAX_SPHERES, MAX_STEPS, Config
from cllm_spheres.errors import InputError
from cllm_spheres.machine import available_memory, check_platform, usable_cores
from cllm_spheres.model import dtypes
from cllm_spheres.model.program import RECOMPUTE
from cllm_spheres.model.shape import Shape
from cllm_spheres.spheres.job import Job
from cllm_spheres.spheres.memory import Regions
from cllm_spheres.spheres.placement import place, read_cores
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.text.windows import evaluation_windows
from cllm_spheres.training.soft_targets import loss_options
from cllm_spheres.units import size

WORKER_BYTES = 12_000_000  # of a forked worker besides its arena, measured at 8 to 12 MB
EVAL_BATCHES = 32  # at most
EVAL_SHARE = 0.05  # of the time of a run, about
STEP_PER_FORWARD = 3  # a training step costs about three forward passes
LONGEST_EVAL_INTERVAL = 250
# What is said of a run that keeps less than it could.
AGAIN = {
    "none": "",
    "cheap": ", norms and activations computed again to save memory",
    "block": ", every block of layers computed again to save memory",
}


def resolve(config: Config, given: set[str], prepared: Prepared) -> Config:
    """Fill in what the data, the preset and the machine decide; `given` names what the user set himself."""
    check_platform()
    check_shape(config)
    _check_text(config, prepared)
    values = config.model_dump()
    values.update(places(config, given))
    batch_size = values["batch_size"]
    values["tokenizer"] = prepared.manifest["tokenizer"]
    values["vocab_size"] = prepared.vocab_size
    if config.dtype == "auto":
        values["dtype"] = dtypes.choose("auto", config.width)
    values["ff_width"] = config.ff_width or 4 * config.width
    if config.epochs is not None:
        windows = len(prepared.train) // config.block_size
        wanted = config.epochs * windows / batch_size
        if wanted > MAX_STEPS:
            raise InputError(
                f"--epochs {config.epochs:g} are {wanted:.3g} steps of this text, and a run has at most {MAX_STEPS:,}."
                " Give fewer."
            )
        values["steps"] = max(1, math.ceil(wanted))
    steps = values["steps"]
    assert steps is not None, "every preset names steps or epochs"
    if config.warmup is None:
        values["warmup"] = min(100, steps // 10)
    if config.min_lr is None:
        values["min_lr"] = config.lr / 10
    if config.eval_every is None:
        values["eval_every"] = min(LONGEST_EVAL_INTERVAL, -(-steps // 8))
    if config.save_every is None:
        values["save_every"] = values["eval_every"]
    if config.eval_tokens is None:
        batches = min(EVAL_BATCHES, max(4, round(values["eval_every"] * EVAL_SHARE * STEP_PER_FORWARD)))
        values["eval_tokens"] = batches * batch_size * config.block_size
    values.update(loss_options(config, prepared.vocab_size))
    resolved = Config(**values)
    check_shape(resolved)  # now that the steps are known
    return resolved


def check_shape(config: Config) -> None:
    """InputError where the model's sizes do not fit each other."""
    if config.width % config.heads:
        fitting = [h for h in range(1, config.width + 1) if config.width % h == 0]
        nearest = min(fitting, key=lambda h: abs(h - config.heads))
        raise InputError(
            f"--heads {config.heads} does not divide --width {config.width}: {config.width} = {config.heads} * "
            f"{config.width // config.heads} + {config.width % config.heads}. Try --heads {nearest}."
        )
    if config.warmup is not None and config.steps is not None and config.warmup > config.steps:
        raise InputError(f"--warmup {config.warmup} is longer than the run, --steps {config.steps}.")
    if config.min_lr is not None and config.min_lr > config.lr:
        raise InputError(f"--min-lr {config.min_lr} is above --lr {config.lr}.")


def _check_text(config: Config, prepared: Prepared) -> None:
    train, val = len(prepared.train), len(prepared.val)
    if train < config.block_size + 1:
        raise InputError(
            f"The training text has {train:,} tokens, shorter than one block: --block-size {config.block_size} needs"
            f" {config.block_size + 1:,}. Give more text or a smaller --block-size."
        )
    if val < 2:
        raise InputError(
            f"The validation part has {val} tokens, and 2 are needed to predict one."
            " Give more text, or prepare it with a larger --val-fraction."
        )


def places(config: Config, given: set[str]) -> dict[str, int]:
    """Workers, spheres and batch size, so that every core is busy and the bits depend on what was asked."""
    cores = len(usable_cores())
    batch_size, spheres, workers = config.batch_size, config.spheres, config.workers
    assert batch_size is not None and spheres is not None, "every preset names both"
    has_spheres, has_batch = "spheres" in given, "batch_size" in given
    if workers is None:
        workers = min(cores, MAX_SPHERES)
    if "workers" not in given:
        workers = min(workers, spheres if has_spheres else workers, batch_size if has_batch else workers)
    if has_spheres and workers > spheres:
        raise InputError(
            f"{workers} workers are more than --spheres {spheres}: each worker computes at least one sphere."
            f" Try --spheres {workers} or --workers {spheres}."
        )
    if not has_spheres:
        # A batch given smaller than the preset's spheres takes fewer of them; more workers raise them.
        spheres = max(min(spheres, batch_size), workers)
    if not has_batch:
        batch_size = max(batch_size, spheres)
    if spheres > batch_size:
        raise InputError(
            f"{spheres} spheres are more than --batch-size {batch_size}: each sphere needs at least one sequence of"
            f" every batch. Try --batch-size {spheres}, or --spheres and --workers of {batch_size} or less."
        )
    return {"workers": workers, "spheres": spheres, "batch_size": batch_size}


def shape_of(config: Config) -> Shape:
    """The model's shape of a resolved configuration."""
    assert config.vocab_size is not None and config.ff_width is not None
    return Shape(
        config.vocab_size,
        config.block_size,
        config.layers,
        config.heads,
        config.width,
        config.ff_width,
        config.bias,
    )


def make_job(config: Config, prepared: Prepared) -> Job:
    """What the workers need to know of a resolved configuration."""
    assert config.batch_size and config.spheres and config.workers and config.eval_tokens
    cores = usable_cores()
    starts, _ = evaluation_windows(len(prepared.val), config.block_size, config.eval_tokens)
    folder = Path(prepared.folder).resolve()
    return Job(
        shape=shape_of(config), batch_size=config.batch_size, spheres=config.spheres, workers=config.workers,
        seed=config.seed, train=str(folder / "train.bin"), val=str(folder / "val.bin"),
        item_bytes=prepared.train.dtype.itemsize, train_tokens=len(prepared.train), val_tokens=len(prepared.val),
        num_windows=len(starts), optimizer=config.optimizer, beta1=config.beta1, beta2=config.beta2,
        weight_decay=config.weight_decay, clip=config.clip or 0.0, dropout=config.dropout,
        skip_nonfinite=config.on_nonfinite == "skip", dtype=dtypes.usable(config.dtype),
        alpha=config.alpha or 0.0, neighbours=(config.neighbours or 0) if config.alpha else 0,
        cores=place(config.workers, read_cores(cores)),
    )  # fmt: skip


def fit(job: Job, recompute: str) -> Job:
    """The job with what it is to compute again: as asked, or with "auto" as little as the memory there is allows."""
    modes = RECOMPUTE if recompute == "auto" else (recompute,)
    jobs = [replace(job, recompute=mode) for mode in modes]
    available = available_memory()
    return next((one for one in jobs if memory_bytes(one) <= available), jobs[-1])


def memory_parts(job: Job) -> dict[str, int]:
    """Bytes that this job takes: the shared memory, in training a copy of what is being saved, each worker's own."""
    copy = job.layout.size * 4 * (3 if job.sizes.has_squares else 2) if job.trains else 0
    own = {"arenas of the workers": job.workers * job.arena_bytes, "processes": job.workers * WORKER_BYTES}
    return Regions(job.sizes).parts | {"copy that is being saved": copy} | own


def memory_bytes(job: Job) -> int:
    """All that this job takes."""
    return sum(memory_parts(job).values())


def check_memory(job: Job, *, resume: bool) -> None:
    """InputError that says what is needed, what is there and what would fit; a resume keeps its spheres."""
    needed, available = memory_bytes(job), available_memory()
    if needed <= available:
        return
    segment = job.layout.size * 4
    fitting = job.spheres - math.ceil((needed - available) / segment)
    if memory_bytes(less := fit(job, "auto")) <= available:
        hint = f"Try --recompute {less.recompute}: it fits, is slower, and changes no bits."
    elif resume:
        hint = "Try fewer --workers, or end other programs."
    elif fitting >= 1:
        hint = f"{fitting} spheres would fit: try --spheres {fitting} --workers {min(job.workers, fitting)}."
    else:
        hint = "No number of spheres would fit: try a smaller --preset, --width, --layers or --vocab-size."
    raise InputError(
        f"Not enough memory: {job.layout.num_parameters:,} parameters with {job.spheres} spheres and"
        f" {job.workers} workers need {size(needed)}, {size(available)} are available"
        f" (each sphere's segment takes {size(segment)}). {hint}"
    )
