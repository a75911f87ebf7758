"""`cllm-spheres bench peers`: the same models trained by us and by PyTorch, in turn -> a table of ratios.

For each size and dtype: a few seconds of every way to train in PyTorch find the best one; then ours and that one
train in turn, A B A B, each time in processes of their own, from the same weights on the same batches. Ours may take
part in several modes of recomputing (A1 A2 B A1 A2 B), each of which becomes a row of its own.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from cllm_spheres_bench import machine_peak, peers_report
from cllm_spheres_bench.machine import facts, installed, results_folder, spread, write_results
from cllm_spheres_bench.peer_torch import MODES, Variant
from cllm_spheres_bench.screening import fastest, num_measurements, screen
from cllm_spheres_bench.sides import Inputs, Measured, make_inputs, our_side, their_side, watch
from cllm_spheres_bench.sizes import SIZES, Size

from cllm_spheres.errors import InputError, RunFailed
from cllm_spheres.machine import usable_cores
from cllm_spheres.model import dtypes
from cllm_spheres.model.costs import flops_per_token
from cllm_spheres.units import duration

DTYPES = ("fp32", "bf16")
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
    recompute: tuple[str, ...] = ("none",)  # what our side computes again, in turn
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


def num_turns(options: Options) -> int:
    """How often a side trains in what is compared."""
    return options.repeats * (len(options.recompute) + 1)


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
        turns = len(options.dtypes) * (num_measurements(self.modes, self.cores) + 1 + num_turns(options))
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

    def ours(self, inputs: Inputs, dtype: str, recompute: str, **watching: Any) -> Measured | str:
        workers, spheres = self.workers_for(inputs.size)
        name = f"{dtype}, cllm-spheres with {workers} workers, {spheres} spheres, recompute {recompute}"

        def side(folder: Path) -> Side:
            return our_side(inputs, folder, dtype, workers, spheres, recompute)

        return self.turn(inputs, name, side, **watching)

    def compare(self, inputs: Inputs, dtype: str) -> list[dict[str, Any]]:
        """Screening and turns of one size and dtype: a row of the result for each mode of recomputing."""
        seconds, modes, reasons = self.options.seconds, self.options.recompute, []

        def speed(variant: Variant) -> float | None:
            found = self.theirs(inputs, variant, seconds=self.options.screen_seconds, memory=False)
            if isinstance(found, str):
                reasons.append(found)
                return None
            return found.tokens_per_s

        screening = screen(self.modes, dtype, self.cores, speed)
        best = next(iter(fastest(screening)), None)
        # A first turn that does not count: our kernels are compiled then, as PyTorch's have been by the screening.
        reason = our_reason_against(dtype) or self.ours(
            inputs, dtype, modes[-1], seconds=self.options.screen_seconds, memory=False
        )  # fmt: skip
        if isinstance(reason, str):
            reasons.append(reason)
            self.progress.say(reason)
        ours: dict[str, list[Measured]] = {mode: [] for mode in modes}
        theirs: list[Measured] = []
        for repeat in range(self.options.repeats):  # in turn, so that what else the machine does falls on both
            watching = {"seconds": seconds, "until_step": max(COMPARED_STEPS) if repeat == 0 else 1}
            for mode in modes if not isinstance(reason, str) else ():
                _sort(self.ours(inputs, dtype, mode, **watching), ours[mode], reasons)
            if best:
                _sort(self.theirs(inputs, best, **watching), theirs, reasons)
        workers, spheres = self.workers_for(inputs.size)
        row = {
            "size": inputs.size.name, "dtype": dtype, "describe": inputs.size.describe(), "workers": workers,
            "spheres": spheres, "flops_per_token": flops_per_token(inputs.size.shape), "reasons": reasons,
            "screening": [{**asdict(v), "name": str(v), "tokens_per_s": s} for v, s in screening.items()],
            "variant": str(best) if best else None,
        }  # fmt: skip
        rows = [
            row | {"recompute": mode} | pair(dtype, self.options.repeats, turns, theirs) for mode, turns in ours.items()
        ]
        for found in rows:
            if "loss_differences" in found:
                said = ", ".join(f"{d:.1e} at step {step}" for step, d in found["loss_differences"].items())
                verdict = "agree" if found["losses_agree"] else "DO NOT AGREE"
                name = f"{inputs.size.name} {dtype}, recompute {found['recompute']}"
                self.progress.say(f"{name}: the losses {verdict}: relative difference {said}")
        return rows


def _sort(found: Measured | str, turns: list[Measured], reasons: list[str]) -> None:
    """A turn to the others of its side, or the reason why it could not be made to the reasons."""
    if isinstance(found, Measured):
        turns.append(found)
    else:
        reasons.append(found)


def pair(dtype: str, repeats: int, ours: list[Measured], theirs: list[Measured]) -> dict[str, Any]:
    """The turns of both sides, their speed, memory and losses; ratios where no turn is missing."""
    found: dict[str, Any] = {}
    for name, turns in {"ours": ours, "theirs": theirs}.items():
        if turns:
            found[name] = {
                "tokens_per_s": spread([t.tokens_per_s for t in turns]),
                "pss_bytes": max(sum(t.pss_bytes.values()) for t in turns), "turns": [asdict(t) for t in turns],
            }  # fmt: skip
    if len(ours) == len(theirs) == repeats:
        found["ratio"] = spread([a.tokens_per_s / b.tokens_per_s for a, b in zip(ours, theirs, strict=True)])
    if all(turns and max(COMPARED_STEPS) in turns[0].losses for turns in (ours, theirs)):
        found["loss_differences"] = differences(ours[0].losses, theirs[0].losses)
        found["losses_agree"] = all(d <= AGREE[dtype] for d in found["loss_differences"].values())
    return found


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
                result["rows"] += comparison.compare(inputs, dtype)
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
