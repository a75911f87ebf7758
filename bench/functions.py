"""python -m cllm_spheres_bench.functions [NAME ...]: errors and speeds of crystal's elementary functions.

Writes bench/results/functions.json and functions.md. Errors: all 2**32 float32, 1e9 samples of float64 and of pow; what
is measured already stays, function by function, so that a run that was stopped goes on; --again measures anew. About an
hour on one core; --processes 2 halves it. Speed beside numpy and, where it is installed (pip install
'cllm-spheres[bench]'), PyTorch, one thread: a minute. The reference itself is compared where mpmath is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cllm_spheres_bench.functions_report import report
from cllm_spheres_bench.machine import facts, results_folder, write_results

from cllm_spheres.errors import InputError, SpheresError
from cllm_spheres.machine import usable_cores
from cllm_spheres.spheres.serving import THREAD_CAPS
from cllm_spheres.units import duration

KINDS = ("float64", "float32")
ALL = ("exp", "log", "tanh", "sigmoid", "gelu", "gelu_slope", "sqrt", "rsqrt", "sin", "cos", "erf", "pow")
CHUNKS = 64  # pieces of a measurement, between which progress is told
SAMPLES = 1_000_000_000
CHECKED = 2000  # arguments at which the reference is compared


def main(arguments: list[str] | None = None) -> int:
    """The command; 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m cllm_spheres_bench.functions", description="Elementary functions.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ALL)}; by default all")
    parser.add_argument("--only", choices=["errors", "speed"], help="one of the two measurements")
    parser.add_argument("--kind", choices=KINDS, help="one kind of numbers")
    parser.add_argument("--samples", type=float, default=SAMPLES, help="where not every argument is compared")
    parser.add_argument("--processes", type=int, default=1, help="of the errors")
    parser.add_argument("--again", action="store_true", help="measure again what is measured already")
    parser.add_argument("--out", type=Path, help="folder of the results; by default bench/results")
    options = parser.parse_args(arguments)
    try:
        run(options, shlex.join(["python", "-m", "cllm_spheres_bench.functions", *(arguments or sys.argv[1:])]))
    except SpheresError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run(options: argparse.Namespace, command: str) -> None:
    """Measure what is wanted and not there; write after each function."""
    if unknown := sorted(set(options.names) - set(ALL)):
        raise InputError(f"There is no function {unknown[0]}: there are {', '.join(ALL)}.")
    if not 1 <= options.processes <= len(usable_cores()):
        raise InputError(
            f"--processes {options.processes}: from 1 to {len(usable_cores())}, the cores of this machine."
        )
    if not 1000 <= options.samples <= 1e12:
        raise InputError(f"--samples {options.samples:g}: from 1000 to 1e12.")
    folder = results_folder(options.out)
    result = earlier(folder / "functions.json")
    keys = [f"{kind} {name}" for kind in KINDS if options.kind in (None, kind) for name in options.names or ALL]
    if options.only != "speed":
        wanted = [key for key in keys if options.again or not _is_there(result["accuracy"].get(key), options.samples)]
        for key, found in errors(wanted, int(options.samples), options.processes):
            result["accuracy"][key] = found
            _write(folder, result, "errors", command)
    if options.only != "errors":
        for key, found in speeds(keys):
            result["speed"][key] = found
        _write(folder, result, "speed", command)
    print(report(result))


def _is_there(found: dict[str, Any] | None, samples: float) -> bool:
    """Whether a measurement has as many samples as are wanted."""
    return found is not None and (found["exhaustive"] or found["count"] >= samples)


def earlier(path: Path) -> dict[str, Any]:
    """A result that is there, or an empty one; InputError where it cannot be read."""
    if not path.exists():
        return {"facts": {}, "accuracy": {}, "speed": {}}
    try:
        found = json.loads(path.read_text())
        return {name: dict(found[name]) for name in ("facts", "accuracy", "speed")}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is not a result of this benchmark: move it away, or give another --out.") from None


def _write(folder: Path, result: dict[str, Any], what: str, command: str) -> None:
    result["facts"][what] = facts(command)
    write_results(folder, "functions", result, report(result))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def errors(keys: list[str], samples: int, processes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, what was found) of each, as it is ready, in order; progress on standard error."""
    from cllm_spheres_bench import functions_accuracy as A

    if not keys:
        return
    began, done = time.monotonic(), 0
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=os.nice, initargs=(10,)) as pool:
        for number, key in enumerate(keys):
            kind, name = key.split()
            blocks = A.blocks_of(kind, name, samples)
            edges = [blocks * i // CHUNKS for i in range(CHUNKS + 1)]
            jobs = {pool.submit(measure, kind, name, a, b) for a, b in pairwise(edges) if b > a}
            found, spoke = A.Found(), 0.0
            A.add_specials(found, kind, name)
            while jobs:
                ready, jobs = wait(jobs, timeout=60, return_when=FIRST_COMPLETED)
                for job in ready:
                    A.merge(found, job.result())
                    done += 1
                if (now := time.monotonic()) - spoke > 10 and done:
                    rest = duration((now - began) / done * (CHUNKS * len(keys) - done))
                    _say(
                        f"[{number + 1}/{len(keys)}] {key}: {found.ulp:.3f} ulp, {found.wrong} wrong, about {rest} left"
                    )
                    spoke = now
            yield (
                key,
                {**asdict(found), "exhaustive": kind == "float32" and name != "pow", "reference_ulp": checked(key)},
            )


def measure(kind: str, name: str, start: int, end: int) -> Any:
    """The blocks from start to end - 1, in a process of the pool."""
    from cllm_spheres_bench import functions_accuracy as A

    found = A.Found()
    for block in range(start, end):
        A.add_block(found, kind, name, block)
    return found


def checked(key: str) -> float | None:
    """The reference's largest error against mpmath in ulp of float64; None without mpmath, and for float32."""
    import numpy as np
    from cllm_spheres_bench import functions_accuracy as A
    from cllm_spheres_bench import functions_reference as R

    kind, name = key.split()
    if kind == "float32":
        return None
    with contextlib.suppress(ImportError):
        if name == "pow":
            return R.check(name, *A.sample_pow(np.float64, 0, CHECKED))
        return R.check(name, A.sample(name, 0, CHECKED))
    return None


def speeds(keys: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, rates by side) of each."""
    from cllm_spheres_bench import functions_speed

    torch: Any = None
    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(1)
    if torch is None:
        _say("PyTorch is not installed: its column stays empty. pip install 'cllm-spheres[bench]'")
    for number, key in enumerate(keys):
        _say(f"[{number + 1}/{len(keys)}] speed of {key}")
        yield key, functions_speed.rates(*key.split(), torch, seconds=0.05, repeats=9)


if __name__ == "__main__":
    os.environ.update(dict.fromkeys(THREAD_CAPS, "1"))
    sys.exit(main())
