"""`cllm-spheres bench faults`: runs whose processes are killed at random -> the same bits, and how soon they recover.

One undisturbed run on one worker is the measure. Then runs with each number of workers, in which random workers, and
now and then the process that starts them, get SIGKILL at random moments: the loss curve, the evaluations and the sha256
of the weights must be the same to the last bit. With --minutes one long run is disturbed instead, and what it holds
(memory, descriptors, threads, processes) is sampled: it may not grow.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cllm_spheres_bench.faults_run import Disturber, Kill, Sample
from cllm_spheres_bench.machine import facts, results_folder, write_results

from cllm_spheres.api import Run
from cllm_spheres.config import MAX_SPHERES
from cllm_spheres.errors import InputError, RunFailed
from cllm_spheres.training import session
from cllm_spheres.training.folder import Plan
from cllm_spheres.training.launch import Launch
from cllm_spheres.units import duration, size

SAMPLE_S = 2.0
KEPT_SAMPLES = 60  # in the file of results; the table is made of all
GROWS = 0.02  # from the first quarter's median to the last's: more is growth, less is noise
JUDGED_SAMPLES = 12  # below, a quarter of them is one or two, and may fall into a recovery
SLOPE_HOURS = 1 / 6  # below, a slope is noise


@dataclass(frozen=True)
class Options:
    """What is disturbed, and how often."""

    kills: int = 200
    minutes: float | None = None
    every_s: float | None = None  # mean time between a recovery and the next kill
    workers: tuple[int, ...] = (1, 2, 7, 16)
    preset: str = "small"
    steps: int = 1000
    seed: int = 1
    out: Path | None = None
    command: str = "cllm-spheres bench faults"


@dataclass
class Found:
    """Of all runs with one number of workers."""

    workers: int
    runs: int = 0
    equal: int = 0
    kills: list[Kill] = field(default_factory=list)

    @property
    def row(self) -> str:
        """A line of the table."""
        seconds = [kill.seconds for kill in self.kills] or [float("nan")]
        p50, p95 = np.percentile(seconds, [50, 95])
        servers = sum(kill.victim == "server" for kill in self.kills)
        return (
            f"| {self.workers} | {self.runs} | {len(self.kills)} | {servers} | {self.equal} of {self.runs} |"
            f" {p50:.3f} | {p95:.3f} | {max(seconds):.3f} |"
        )


def bits(run: Path) -> tuple[str, str]:
    """sha256 over all that must not depend on who died: the curves, and the last weights and moments."""
    recorded = Run(run)
    steps = [(r["step"], r["loss"], r["grad_norm"], r["clipped_norm"]) for r in recorded.metrics("step")]
    evaluations = [(r["step"], r["val_loss"]) for r in recorded.metrics("eval")]
    last, weights = max(run.glob("checkpoints/step-*")), hashlib.sha256()
    for name in ("model.safetensors", "optimizer.safetensors"):
        weights.update((last / name).read_bytes())
    return hashlib.sha256(json.dumps([steps, evaluations]).encode()).hexdigest(), weights.hexdigest()


def begin(run: Path, workers: int, options: Options, steps: int) -> Launch:
    """A run under way; one sphere for each of the most workers, so that all have the same bits."""
    spheres = max(options.workers)
    config: dict[str, Any] = dict(
        preset=options.preset, spheres=spheres, batch_size=spheres, workers=workers, steps=steps, keep=1,
        eval_every=max(1, min(steps // 4, 1000)), eval_tokens=2048,
    )  # fmt: skip
    plan: Plan = session.new_run(None, config, run=run, file=None)
    return Launch().obey(plan)


def finished(launch: Launch) -> None:
    code, message = launch.finish()
    if code:
        raise RunFailed(f"A disturbed run failed: {message}")


def run(options: Options) -> int:
    """Disturb and compare, or soak; print and write what was found. 1 where bits differ."""
    if not 1 <= max(options.workers) <= MAX_SPHERES or min(options.workers) < 1:
        raise InputError(f"--workers: from 1 to {MAX_SPHERES} are possible.")
    folder = results_folder(options.out)
    with tempfile.TemporaryDirectory(prefix="cllm-spheres-") as place:
        return _soak(options, Path(place), folder) if options.minutes else _compare(options, Path(place), folder)


def _compare(options: Options, place: Path, folder: Path) -> int:
    rng, began = random.Random(options.seed), time.monotonic()
    print(f"An undisturbed run: {options.steps:,} steps of preset {options.preset}, 1 worker ...", flush=True)
    launch = begin(place / "undisturbed", 1, options, options.steps)
    finished(launch)
    expected = bits(place / "undisturbed")
    found = []
    for number, workers in enumerate(options.workers):
        share = options.kills * (number + 1) // len(options.workers) - options.kills * number // len(options.workers)
        one = Found(workers)
        found.append(one)
        while len(one.kills) < share:
            before, target = len(one.kills), place / f"{workers}-{one.runs}"
            launch = begin(target, workers, options, options.steps)
            disturber = Disturber(launch, rng)
            while len(one.kills) < share and disturber.wait_for_step():
                time.sleep(rng.random() * 2 * (options.every_s or 0.05))
                if kill := disturber.kill():
                    one.kills.append(kill)
            finished(launch)
            one.runs += 1
            one.equal += bits(target) == expected
            print(f"{workers} workers: {len(one.kills)} of {share} kills, {one.equal} of {one.runs} runs equal.")
            if len(one.kills) == before:
                raise InputError(f"--steps {options.steps} are too few to kill anybody meanwhile: give more.")
    return _report(options, found, time.monotonic() - began, folder)


def _report(options: Options, found: list[Found], seconds: float, folder: Path) -> int:
    everything = Found(0, sum(f.runs for f in found), sum(f.equal for f in found), [k for f in found for k in f.kills])
    states = Counter(kill.state for kill in everything.kills)
    lines = [
        f"{len(everything.kills)} SIGKILLs at random moments, {options.steps:,} steps of preset {options.preset},"
        f" {max(options.workers)} spheres, in {duration(seconds)}. Seconds from the signal to the event that says that"
        " all are replaced and the step goes on.", "",
        "| workers | runs | kills | of the server | equal bits | p50 s | p95 s | longest s |",
        "|--:|--:|--:|--:|---|--:|--:|--:|",
        *(one.row for one in found), everything.row.replace("| 0 |", "| all |", 1), "",
        "What they were doing: " + ", ".join(f"{state} {count}" for state, count in states.most_common()) + ".",
    ]  # fmt: skip
    data = {"kills": [asdict(kill) | {"workers": one.workers} for one in found for kill in one.kills]}
    _publish(folder, "faults", "Killed at random", options, lines, data)
    return 0 if everything.equal == everything.runs else 1


def _soak(options: Options, place: Path, folder: Path) -> int:
    assert options.minutes is not None
    rng, workers = random.Random(options.seed), max(options.workers)
    launch = begin(place / "soak", workers, options, 10**8)
    disturber = Disturber(launch, rng)
    samples: list[Sample] = []
    sampled = -SAMPLE_S
    kills: list[Kill] = []
    disturber.wait_for_step()
    until = time.monotonic() + 60 * options.minutes
    next_kill = time.monotonic()
    while time.monotonic() < until and launch.alive:
        if time.monotonic() >= next_kill and disturber.wait_for_step() and (kill := disturber.kill()):
            kills.append(kill)
            next_kill = time.monotonic() + rng.random() * 2 * (options.every_s or 3.0)
        time.sleep(min(SAMPLE_S, max(0.05, next_kill - time.monotonic())))
        if time.monotonic() >= sampled + SAMPLE_S and (sample := disturber.sample()):
            samples.append(sample)
            sampled = time.monotonic()
            if len(samples) % 30 == 0:
                print(f"{duration(sample.at_s)}: {len(kills)} kills, {size(sample.memory_bytes)}.", flush=True)
    if not launch.alive:
        finished(launch)
        raise RunFailed("The run ended before its time.")
    launch.pass_on(15)
    launch.finish()
    return _report_soak(options, kills, samples, folder)


def _report_soak(options: Options, kills: list[Kill], samples: list[Sample], folder: Path) -> int:
    steady = samples[len(samples) // 10 :]  # without the beginning, where buffers are taken
    at = np.array([s.at_s for s in steady]) / 3600
    lines = [
        f"{len(kills)} SIGKILLs within {duration(samples[-1].at_s)}, {max(options.workers)} workers, preset"
        f" {options.preset}; {len(samples)} samples. Without the first tenth:", "",
        "| | median of the first quarter | of the last | slope an hour | least | most |", "|---|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    grown: list[str] = []
    for name, unit in (("memory_bytes", 1e6), ("descriptors", 1), ("threads", 1), ("processes", 1)):
        values = np.array([getattr(s, name) for s in steady]) / unit
        quarter = max(1, len(values) // 4)
        first, last = np.median(values[:quarter]), np.median(values[-quarter:])
        slope = f"{np.polyfit(at, values, 1)[0]:+.2f}" if at[-1] - at[0] >= SLOPE_HOURS else "too short"
        grown += [name] * bool(len(values) >= JUDGED_SAMPLES and last > first * (1 + GROWS))
        lines.append(
            f"| {name.replace('memory_bytes', 'memory, MB')} | {first:.1f} | {last:.1f} | {slope} |"
            f" {values.min():.1f} | {values.max():.1f} |"
        )
    seconds = [kill.seconds for kill in kills]
    p50, p95 = np.percentile(seconds, [50, 95])
    lines += ["", f"Recovery: p50 {p50:.3f} s, p95 {p95:.3f} s, longest {max(seconds):.3f} s.", ""]
    nothing = "Nothing grew from the first quarter to the last."
    if len(steady) < JUDGED_SAMPLES:
        nothing = f"{len(steady)} samples are too few to say whether it grew."
    lines += [f"It grew: {', '.join(grown)}." if grown else nothing]
    kept = samples[:: max(1, len(samples) // KEPT_SAMPLES)]
    data = {"kills": [asdict(kill) for kill in kills], "samples": [asdict(sample) for sample in kept]}
    _publish(folder, "soak", "Killed for a long time", options, lines, data)
    return 1 if grown else 0


def _publish(
    folder: Path, name: str, title: str, options: Options, lines: list[str], data: dict[str, Any]
) -> None:  # fmt: skip
    about = facts(options.command)
    text = "\n".join(lines) + "\n"
    where = f"{about['cores']} cores of {about['machine']}, commit {about['commit']}, {about['date']}"
    head = f"# {title}\n\n`{about['command']}`, {where}.\n\n"
    write_results(folder, name, about | data, head + text)
    print("\n" + text)
