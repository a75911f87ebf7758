"""`cllm-spheres bench scaling`: the same training by 1 to 63 workers -> a table, a chart and a model of more cores.

Strong scaling: the spheres and the batch stay. Weak scaling: a sphere and its sequences for each worker. The text is
random tokens: what is measured does not depend on them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cllm_spheres_bench import scaling_model as model
from cllm_spheres_bench import scaling_report as report
from cllm_spheres_bench.machine import facts, results_folder, write_results
from cllm_spheres_bench.scaling_run import Point, bandwidth, measure

from cllm_spheres.config import MAX_SPHERES, build, preset_values
from cllm_spheres.errors import InputError
from cllm_spheres.machine import available_memory, usable_cores
from cllm_spheres.model.dtypes import usable
from cllm_spheres.model.layout import Layout
from cllm_spheres.spheres.job import Job
from cllm_spheres.spheres.placement import place, read_cores
from cllm_spheres.training.plan import memory_bytes, shape_of
from cllm_spheres.units import duration, size

WORKERS = (1, 2, 4, 8, 16, 32, 63)
SEQUENCES = 2  # of a sphere, where no batch is given
TOKENS = 1 << 20


@dataclass(frozen=True)
class Options:
    """What is measured, and how long."""

    preset: str = "medium"
    workers: tuple[int, ...] = WORKERS
    spheres: int | None = None
    batch_size: int | None = None
    seconds: float = 5.0
    repeats: int = 1
    dtype: str = "auto"
    weak: bool = True
    out: Path | None = None
    command: str = "cllm-spheres bench scaling"


def numbers(words: str) -> tuple[int, ...]:
    """Workers between commas -> sorted and once each. InputError where one is no number or out of range."""
    try:
        found = sorted({int(word) for word in words.split(",")})
    except ValueError:
        raise InputError(f"--workers {words!r} is not a list of numbers such as 1,2,4.") from None
    if found[0] < 1 or found[-1] > MAX_SPHERES:
        raise InputError(f"--workers {words}: from 1 to {MAX_SPHERES} are possible.")
    return tuple(found)


def jobs(options: Options, corpus: Path) -> dict[str, list[Job]]:
    """Strong and weak scaling -> a job for each number of workers. InputError where the options do not fit."""
    spheres = options.spheres or max(options.workers)
    batch_size = options.batch_size or SEQUENCES * spheres
    if max(options.workers) > spheres:
        raise InputError(f"{max(options.workers)} workers are more than --spheres {spheres}.")
    if batch_size < spheres:
        raise InputError(f"--batch-size {batch_size} is smaller than the {spheres} spheres: each needs a sequence.")
    values = preset_values(options.preset) | {"dtype": options.dtype}
    config = build(values | {"vocab_size": values.get("vocab_size"), "ff_width": values.get("ff_width")})
    config = build(config.model_dump() | {"ff_width": config.ff_width or 4 * config.width})
    cores = read_cores(usable_cores())

    def job(workers: int, spheres: int, batch_size: int) -> Job:
        return Job(
            shape=shape_of(config), batch_size=batch_size, spheres=spheres, workers=workers, seed=1,
            train=str(corpus), val=str(corpus), item_bytes=2, train_tokens=TOKENS, val_tokens=TOKENS, num_windows=0,
            dtype=usable(config.dtype), cores=place(workers, cores),
        )  # fmt: skip

    each = -(-batch_size // spheres)
    found = {"strong": [job(w, spheres, batch_size) for w in options.workers]}
    if options.weak:
        found["weak"] = [job(w, w, each * w) for w in options.workers]
    return found


def run(options: Options) -> int:
    """Measure, print, write scaling-PRESET-DTYPE.json, .md and, with matplotlib, .svg; the exit code."""
    folder = results_folder(options.out)
    report.need_plots()
    cores = len(usable_cores())
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        corpus = Path(file.name)
        plan = jobs(options, corpus)
        vocab_size = plan["strong"][0].shape.vocab_size
        np.random.default_rng(0).integers(0, vocab_size, TOKENS).astype("<u2").tofile(corpus)
        points, left_out = _measure_all(plan, options, _Progress(sum(map(len, plan.values())) * options.repeats))
    if not points["strong"]:
        raise InputError(f"Nothing fits: {left_out[0]}")
    machine = {str(n): bandwidth(n) for n in sorted({1, cores})}
    parameters = Layout(plan["strong"][0].shape).size
    parts = calibrate(points, plan["strong"][0], cores)
    result: dict[str, Any] = facts(options.command) | {
        "preset": options.preset, "dtype": plan["strong"][0].dtype, "parameters": parameters, "left_out": left_out,
        "bandwidth_gb_per_s": machine, "model": asdict(parts),
        "points": {kind: [asdict(point) for point in found] for kind, found in points.items()},
    }  # fmt: skip
    text = report.markdown_of(result, points, parts)
    report.show(text, points, parts, cores)
    name = f"scaling-{options.preset}-{result['dtype']}"
    written = [*write_results(folder, name, result, text), report.chart(folder / f"{name}.svg", points, parts, result)]
    print("Written:", ", ".join(str(path) for path in written if path))
    return 0


def calibrate(points: dict[str, list[Point]], job: Job, cores: int) -> model.Parts:
    """The model's parts from the strong points: one worker alone, and as many as have a core."""
    strong = points["strong"]
    alone = strong[0]
    together = max((p for p in strong if p.workers <= cores), key=lambda p: p.workers, default=alone)

    def seconds(phase: str) -> tuple[float, float]:
        return alone.phases_s[phase] * alone.workers, together.phases_s[phase]

    # Phases are means over the workers, of which each hosts spheres / workers of the spheres on average.
    shard_s = together.phases_s["compute"] * together.workers / job.spheres
    (gather, gather_all), (update, update_all), (pack, pack_all) = map(seconds, ("gather", "update", "pack"))
    return model.Parts(
        shard_s, gather, gather_all, update, update_all, pack, pack_all, job.spheres, job.optimizer == "adamw",
        model.fit_barrier({p.workers: p.barrier_s for p in strong}),
    )  # fmt: skip


def _measure_all(
    plan: dict[str, list[Job]], options: Options, progress: _Progress
) -> tuple[dict[str, list[Point]], list[str]]:
    """Every job `repeats` times in turn -> of each the run with the median rate; and why others were left out."""
    found: dict[tuple[str, int], list[Point]] = {}
    left_out: dict[str, None] = {}
    for _ in range(options.repeats):
        for kind, kind_jobs in plan.items():
            for job in kind_jobs:
                needed, available = memory_bytes(job), available_memory()
                if needed > available:
                    left_out[
                        f"{job.workers} workers with {job.spheres} spheres need {size(needed)},"
                        f" {size(available)} are available"
                    ] = None
                    progress.skip()
                    continue
                with progress.of(f"{kind}, workers {job.workers}, spheres {job.spheres}, batch {job.batch_size}"):
                    found.setdefault((kind, job.workers), []).append(measure(job, options.seconds, progress.say))
    points: dict[str, list[Point]] = {kind: [] for kind in plan}
    for (kind, _), same in found.items():
        points[kind].append(sorted(same, key=lambda p: p.tokens_per_s)[len(same) // 2])
    return points, list(left_out)


class _Progress:
    """A line on standard error for each measurement, with the time that the rest will take."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.began = total, 0, time.monotonic()

    def say(self, text: str) -> None:
        if text:
            print(text, file=sys.stderr, flush=True)

    def skip(self) -> None:
        self.total -= 1

    def of(self, what: str) -> _Progress:
        passed = time.monotonic() - self.began
        left = f", about {duration(passed / self.done * (self.total - self.done))} left" if self.done else ""
        self.say(f"[{self.done + 1}/{self.total}] {what}{left}")
        return self

    def __enter__(self) -> Callable[[str], None]:
        return self.say

    def __exit__(self, *_: object) -> None:
        self.done += 1
