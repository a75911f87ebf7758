"""`cllm-spheres bench kernels`: each kernel and matrix product of a size alone, on one core -> tables of GFLOP/s, GB/s.

Ours, OpenBLAS, numpy and, where it is installed, PyTorch (whose matrix products are MKL's and oneDNN's) compute the
same in turn. The measuring process has its thread caps set before numpy loads and stays on one core:

    python -m cllm_spheres_bench.kernels PARENT_PID JSON

prints a line of JSON with the machine's peaks, then one for each size.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from cllm_spheres_bench.children import end_tree, end_with
from cllm_spheres_bench.kernel_report import report
from cllm_spheres_bench.machine import facts, installed, results_folder, spread, write_results
from cllm_spheres_bench.sizes import SIZES, Size

from cllm_spheres.errors import InputError, RunFailed
from cllm_spheres.machine import usable_cores
from cllm_spheres.model.dtypes import usable
from cllm_spheres.spheres.serving import THREAD_CAPS
from cllm_spheres.units import duration

MEMORY_FLOATS = 1 << 27  # of each array when the memory's peak is measured: 512 MB, more than caches hold
NAME = "kernels"


@dataclass(frozen=True)
class Options:
    """What is measured, and how long."""

    sizes: list[Size]
    repeats: int = 5
    seconds: float = 0.03
    out: Path | None = None
    command: str = "cllm-spheres bench kernels"


def run(options: Options) -> int:
    """Measure, print, write kernels.json and .md after each size; sizes measured before stay. The exit code."""
    folder = results_folder(options.out)
    results = earlier(folder / f"{NAME}.json")
    order = {
        "sizes": [size.name for size in options.sizes], "repeats": options.repeats, "seconds": options.seconds,
    }  # fmt: skip
    if installed("torch") == "none":
        _say("PyTorch is not installed: its columns stay empty. pip install 'cllm-spheres[bench]'")
    paths: tuple[Path, ...] = ()
    with _measuring(order) as lines:
        peaks = json.loads(next(lines))
        for line in lines:
            found = json.loads(line)
            results[found["size"]] = (
                facts(options.command) | peaks | found | {"repeats": options.repeats, "seconds": options.seconds}
            )
            results = {name: results[name] for name in SIZES if name in results}
            paths = write_results(folder, NAME, {"sizes": results}, report(results))
    print(report({size.name: results[size.name] for size in options.sizes}))
    print("Written:", ", ".join(map(str, paths)))
    return 0


def earlier(path: Path) -> dict[str, Any]:
    """The sizes of a result that is there; InputError where it cannot be read."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text())["sizes"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} is not a result of this benchmark, whose other sizes would stay: move it away, or give another"
            " --out."
        ) from None


@contextlib.contextmanager
def _measuring(order: dict[str, Any]) -> Iterator[Iterator[str]]:
    """The measuring process's lines, all of them; RunFailed where it ends badly. It ends with us."""
    process = psutil.Popen(
        [sys.executable, "-P", "-m", "cllm_spheres_bench.kernels", str(os.getpid()), json.dumps(order)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, **dict.fromkeys(THREAD_CAPS, "1")},
    )  # fmt: skip

    def lines() -> Iterator[str]:
        yield from process.stdout
        if code := process.wait():
            raise RunFailed(f"The measuring process ended with exit code {code}; what it said stands above.")

    try:
        yield lines()
    finally:
        end_tree(process)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- in the measuring process ---


def timed(way: Callable[[int], object], seconds: float) -> int:
    """How many times a call fits into a window, at least once; it has been warmed by then."""
    way(1)
    times = 1
    while True:
        began = time.perf_counter()
        way(times)
        passed = time.perf_counter() - began
        if passed >= seconds / 4:
            return max(1, round(times * seconds / passed))
        times *= 4


def measure(ways: dict[str, Callable[[int], object]], work: int, seconds: float, repeats: int) -> dict[str, Any]:
    """Every way in turn, `repeats` windows each -> its rates in units of 1e9 a second, as `spread` gives them."""
    windows = {name: timed(way, seconds) for name, way in ways.items()}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            way(windows[name])
            rates[name].append(windows[name] * work / (time.perf_counter() - began) * 1e-9)
    return {name: spread(values) for name, values in rates.items()}


def cases_of(size: Size, torch: Any) -> list[Any]:
    """All lines of a size, in float32 and, where this CPU has it, in bfloat16."""
    from cllm_spheres_bench import kernel_cases

    found = list(kernel_cases.cases(size, torch))
    if usable("bf16") == "bf16":
        from cllm_spheres_bench import kernel_cases_bf16

        found += kernel_cases_bf16.cases(size, torch)
    return found


def measure_peaks() -> dict[str, Any]:
    """The core's peak of products by dtype, and its memory's of reading and of a triad."""
    from cllm_spheres_bench import machine_peak
    from cllm_spheres_bench.scaling_run import bandwidth

    return {"peaks": machine_peak.measure(1), "bandwidth_gb_per_s": bandwidth(1, floats=MEMORY_FLOATS, repeats=3)}


def main() -> None:
    """Measure and print, in a process that was started for it."""
    end_with(int(sys.argv[1]))
    os.sched_setaffinity(0, {max(usable_cores())})
    order = json.loads(sys.argv[2])
    torch: Any = None
    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(1)
    plan = {name: cases_of(SIZES[name], torch) for name in order["sizes"]}
    _say("The peaks of this core: about 10 s")
    print(json.dumps(measure_peaks() | {"torch": torch.__version__ if torch else None}), flush=True)
    total, done, began = sum(map(len, plan.values())), 0, time.monotonic()
    spoke = began - 1
    for name, cases in plan.items():
        rows = []
        for case in cases:
            if (now := time.monotonic()) - spoke >= 1:
                left = f", about {duration((now - began) / done * (total - done))} left" if done else ""
                _say(f"[{done + 1}/{total}] {name} {case.dtype} {case.name}, {case.sizes}{left}")
                spoke = now
            rates = measure(case.build(), case.work, order["seconds"], order["repeats"])
            rows.append({
                "table": case.table, "dtype": case.dtype, "name": case.name, "sizes": case.sizes, "work": case.work,
                "rates": rates,
            })  # fmt: skip
            done += 1
        print(json.dumps({"size": name, "describe": SIZES[name].describe(), "rows": rows}), flush=True)


if __name__ == "__main__":
    main()
