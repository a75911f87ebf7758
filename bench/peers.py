"""`cllm-spheres bench peers`: the same models trained by us and by PyTorch, in turn -> a table of ratios.

For each size and dtype: a few seconds of every way to train in PyTorch find the best one; then ours and that one
train in turn, A B A B, each time in processes of their own, from the same weights on the same batches.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from cllm_spheres_bench import machine_peak, peers_report
from cllm_spheres_bench.machine import facts, installed, results_folder, spread, write_results
from cllm_spheres_bench.peer_torch import ATTENTIONS, GELUS, MODES, Variant
from cllm_spheres_bench.sides import Inputs, Measured, make_inputs, our_side, their_side, watch
from cllm_spheres_bench.sizes import SIZES, Size

from cllm_spheres.errors import InputError, RunFailed
from cllm_spheres.machine import usable_cores
from cllm_spheres.model import dtypes
from cllm_spheres.model.costs import flops_per_token
from cllm_spheres.units import duration

DTYPES = ("fp32", "bf16")
FINALISTS = 2  # of the screening are measured twice
COMPARED_STEPS = (1, 20)
AGREE = {"fp32": 1e-3, "bf16": 2e-2}  # relative difference of the losses at those steps
Side = AbstractContextManager[tuple[psutil.Popen, Path]]


@dataclass(frozen=True)
class Options:
    """What is compared, and how long."""

    sizes: list[Size]
    dtypes: list[str]
    repeats: int = 3
    seconds: float = 10.0
    screen_seconds: float = 3.0
    workers: int | None = None
    spheres: int | None = None
    modes: tuple[str, ...] = MODES
    out: Path | None = None
    command: str = "cllm-spheres bench peers"


def check_torch() -> None:
    """InputError where PyTorch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            "PyTorch is missing, the peer of this comparison: pip install 'cllm-spheres[bench]'."
            " Its build for CPUs alone is much smaller and will do."
        )


def has_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler."""
    return shutil.which(os.environ.get("CXX") or "g++") is not None


def our_reason_against(dtype: str) -> str | None:
    """Why our side cannot train in a dtype here, in a sentence; None where it can."""
    if dtypes.usable(dtype) == dtype:
        return None
    return f"Asked for {dtype}, cllm-spheres trains in {dtypes.describe(dtype)}."


def screen(
    modes: tuple[str, ...], dtype: str, cores: int, measure: Callable[[Variant], float | None]
) -> dict[Variant, float | None]:
    """Tokens/s of PyTorch's variants: every mode and attention on all cores, then the best with what is left.

    The exact GELU and other numbers of threads are tried on the best so far only: they change little else. The two
    fastest are measured once more, and the better figure counts: neighbours differ by less than the machine's noise.
    """
    found: dict[Variant, float | None] = {}

    def best() -> Variant | None:
        return next(iter(fastest(found)), None)

    for mode in modes:
        for attention in ATTENTIONS:
            variant = Variant(dtype, mode, attention, GELUS[0], cores)
            found[variant] = measure(variant)
    if first := best():
        variant = replace(first, gelu=GELUS[1])
        found[variant] = measure(variant)
    for threads in fewer_threads(cores):
        if first := best():
            variant = replace(first, threads=threads)
            found[variant] = measure(variant)
    for variant in fastest(found)[:FINALISTS]:
        found[variant] = max(found[variant] or 0.0, measure(variant) or 0.0)
    return found


def fastest(found: dict[Variant, float | None]) -> list[Variant]:
    """The variants that could be measured, the fastest first."""
    return sorted((v for v, speed in found.items() if speed), key=lambda v: -(found[v] or 0.0))


def fewer_threads(cores: int) -> list[int]:
    """The numbers of threads that are tried besides all cores."""
    return [threads for threads in (1, 2) if threads < cores]


def num_measurements(modes: tuple[str, ...], cores: int) -> int:
    """How often `screen` measures."""
    return len(modes) * len(ATTENTIONS) + 1 + len(fewer_threads(cores)) + FINALISTS


def differences(ours: dict[int, float], theirs: dict[int, float]) -> dict[int, float]:
    """Relative difference of the losses at the compared steps."""
    return {step: abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in COMPARED_STEPS}


@dataclass
class Progress:
    """Lines on standard error, with the time left: turns still to do, each as long as those of its size so far."""

    left: Counter[str]
    took: dict[str, list[float]] = field(default_factory=dict)

    def say(self, text: str) -> None:
        print(f"[about {duration(self.left_s())} left] {text}" if self.took else text, file=sys.stderr, flush=True)

    def turn(self, size: str, seconds: float) -> None:
        self.took.setdefault(size, []).append(seconds)
        self.left[size] = max(0, self.left[size] - 1)

    def left_s(self) -> float:
        every = [seconds for group in self.took.values() for seconds in group]
        mean = sum(every) / len(every)
        return sum(
            count * (sum(self.took[size]) / len(self.took[size]) if size in self.took else mean)
            for size, count in self.left.items()
        )


class Comparison:
    """One run of the benchmark."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.cores = len(usable_cores())
        self.modes = options.modes
        self.notes: list[str] = []
        if not has_compiler() and self.modes != ("eager",):
            self.modes = ("eager",)
            self.notes.append("torch.compile needs a C++ compiler and there is none (g++): PyTorch is eager only.")
        turns = len(options.dtypes) * (num_measurements(self.modes, self.cores) + 1 + 2 * options.repeats)
        self.progress = Progress(Counter({size.name: turns for size in options.sizes}))
        for note in self.notes:
            self.progress.say(note)

    def workers_for(self, size: Size) -> tuple[int, int]:
        """Workers and spheres: as many as cores, but no more than the batch has sequences."""
        batch = size.config.batch_size
        assert batch is not None
        workers = self.options.workers or min(self.cores, batch)
        spheres = self.options.spheres or workers
        if not workers <= spheres <= batch:
            raise InputError(
                f"{size.name} has a batch of {batch}: it needs workers <= spheres <= {batch}, not {workers} workers"
                f" and {spheres} spheres."
            )
        return workers, spheres

    def turn(self, inputs: Inputs, name: str, side: Callable[[Path], Side], **watching: Any) -> Measured | str:
        """Start a side, watch it, end it; the reason where it cannot do it."""
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="cllm-peers-") as folder:
            try:
                with side(Path(folder)) as (process, metrics):
                    result: Measured | str = watch(
                        inputs.size, process, metrics, Path(folder) / "said", **watching
                    )  # fmt: skip
            except RunFailed as error:
                result = f"{name}: {error}"
        self.progress.turn(inputs.size.name, time.monotonic() - began)
        told = result if isinstance(result, str) else f"{name}: {result.tokens_per_s:,.0f} tokens/s"
        self.progress.say(f"{inputs.size.name} {told}")
        return result

    def theirs(self, inputs: Inputs, variant: Variant, **watching: Any) -> Measured | str:
        name = f"{variant.dtype}, PyTorch {variant}"
        return self.turn(inputs, name, lambda folder: their_side(inputs, folder, variant), **watching)

    def ours(self, inputs: Inputs, dtype: str, **watching: Any) -> Measured | str:
        workers, spheres = self.workers_for(inputs.size)
        name = f"{dtype}, cllm-spheres with {workers} workers, {spheres} spheres"
        return self.turn(inputs, name, lambda folder: our_side(inputs, folder, dtype, workers, spheres), **watching)

    def compare(self, inputs: Inputs, dtype: str) -> dict[str, Any]:
        """Screening and turns of one size and dtype: a row of the result."""
        seconds, reasons = self.options.seconds, []

        def speed(variant: Variant) -> float | None:
            found = self.theirs(inputs, variant, seconds=self.options.screen_seconds, memory=False)
            if isinstance(found, str):
                reasons.append(found)
                return None
            return found.tokens_per_s

        screening = screen(self.modes, dtype, self.cores, speed)
        best = next(iter(fastest(screening)), None)
        sides: dict[str, list[Measured]] = {"ours": [], "theirs": []}
        # A first turn that does not count: our kernels are compiled then, as PyTorch's have been by the screening.
        reason = our_reason_against(dtype) or self.ours(
            inputs, dtype, seconds=self.options.screen_seconds, memory=False
        )  # fmt: skip
        if isinstance(reason, str):
            reasons.append(reason)
            self.progress.say(reason)
        for repeat in range(self.options.repeats):  # in turn, so that what else the machine does falls on both
            until = max(COMPARED_STEPS) if repeat == 0 else 1
            for name in sides:
                if name == "ours":
                    can = not isinstance(reason, str)
                    found = self.ours(inputs, dtype, seconds=seconds, until_step=until) if can else None
                else:
                    found = self.theirs(inputs, best, seconds=seconds, until_step=until) if best else None
                if isinstance(found, Measured):
                    sides[name].append(found)
                elif found:
                    reasons.append(found)
        workers, spheres = self.workers_for(inputs.size)
        row: dict[str, Any] = {
            "size": inputs.size.name, "dtype": dtype, "describe": inputs.size.describe(), "workers": workers,
            "spheres": spheres, "flops_per_token": flops_per_token(inputs.size.shape), "reasons": reasons,
            "screening": [{**asdict(v), "name": str(v), "tokens_per_s": s} for v, s in screening.items()],
            "variant": str(best) if best else None,
        }  # fmt: skip
        for name, turns in sides.items():
            if turns:
                row[name] = {
                    "tokens_per_s": spread([t.tokens_per_s for t in turns]),
                    "pss_bytes": max(sum(t.pss_bytes.values()) for t in turns), "turns": [asdict(t) for t in turns],
                }  # fmt: skip
        if all(len(turns) == self.options.repeats for turns in sides.values()):
            pairs = zip(sides["ours"], sides["theirs"], strict=True)
            row["ratio"] = spread([a.tokens_per_s / b.tokens_per_s for a, b in pairs])
        if all(turns and max(COMPARED_STEPS) in turns[0].losses for turns in sides.values()):
            found_differences = differences(sides["ours"][0].losses, sides["theirs"][0].losses)
            row["loss_differences"] = found_differences
            row["losses_agree"] = all(d <= AGREE[dtype] for d in found_differences.values())
            said = ", ".join(f"{d:.1e} at step {step}" for step, d in found_differences.items())
            verdict = "agree" if row["losses_agree"] else "DO NOT AGREE"
            self.progress.say(f"{inputs.size.name} {dtype}: the losses {verdict}: relative difference {said}")
        return row


def run(options: Options) -> int:
    """Compare, print and write; 1 where a loss was not PyTorch's, else 0. InputError for what cannot be compared."""
    check_torch()
    comparison = Comparison(options)
    for size in options.sizes:
        comparison.workers_for(size)
    folder = results_folder(options.out)
    result: dict[str, Any] = {
        **facts(options.command), "torch": installed("torch"), "repeats": options.repeats,
        "seconds": options.seconds, "notes": comparison.notes, "peaks": {}, "rows": [],
    }  # fmt: skip
    name = result_name(options)
    measure_peaks(result, comparison)
    with tempfile.TemporaryDirectory(prefix="cllm-peers-") as temporary:
        for size in options.sizes:
            place = Path(temporary) / size.name
            place.mkdir()
            comparison.progress.say(f"{size.name}: {size.describe()}. Preparing its text, weights and batches ...")
            inputs = make_inputs(size, place, options.seconds)
            for dtype in options.dtypes:
                result["rows"].append(comparison.compare(inputs, dtype))
                write_results(folder, name, result, peers_report.report(result))  # what is measured is kept
            shutil.rmtree(place)
    measure_peaks(result, comparison)
    text = peers_report.report(result)
    paths = write_results(folder, name, result, text)
    print(text)
    print("Written: " + ", ".join(map(str, paths)), file=sys.stderr)
    return 0 if all(row.get("losses_agree", True) for row in result["rows"]) else 1


def result_name(options: Options) -> str:
    """peers, and behind it what it is limited to, so that a part never overwrites the whole."""
    parts = ["peers"]
    if len(options.sizes) < len(SIZES):
        parts += [size.name for size in options.sizes]
    if len(options.dtypes) < len(DTYPES):
        parts += options.dtypes
    return "-".join(parts)


def measure_peaks(result: dict[str, Any], comparison: Comparison) -> None:
    """Measure the GEMM peaks on one core and on all; of several measurements in a run the best counts."""
    for threads in sorted({1, comparison.cores}):
        comparison.progress.say(f"Measuring matrix products on {threads} core{'s' * (threads > 1)} ...")
        for dtype, peak in machine_peak.measured(threads).items():
            place = result["peaks"].setdefault(dtype, {})
            if peak["gflops"] > place.get(str(threads), {"gflops": 0})["gflops"]:
                place[str(threads)] = peak


if __name__ == "__main__":
    from cllm_spheres_cli import main

    sys.argv[1:1] = ["bench", "peers"]
    main()
