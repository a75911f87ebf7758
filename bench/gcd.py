"""python -m cllm_spheres_bench.gcd [--repeats N] [--seconds S] [--out DIR]

The claim "a similarity by common divisors is 20 to 400 times faster than a dot product", measured: gcd against a
float32 dot product of 64, 128, 256 and 1024 dimensions, one pair at a time and a whole matrix, both as fast as we can
make them, on one thread, in turn. Writes bench/results/gcd.json and gcd.md. Windows are short and many: on a machine
that others use too, the median is of those that nobody interrupted.
"""

# N pairs, V tokens, D dimensions

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CAPS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
if __name__ == "__main__" and any(os.environ.get(name) != "1" for name in CAPS):  # numpy looks at them as it loads
    os.execve(
        sys.executable, [sys.executable, "-m", "cllm_spheres_bench.gcd", *sys.argv[1:]],
        {**os.environ, **dict.fromkeys(CAPS, "1")},
    )  # fmt: skip

import numpy as np  # noqa: E402
from cllm_spheres_bench.gcd_loops import (  # noqa: E402
    PAIRS,
    repeat_binary,
    repeat_dots,
    repeat_euclid,
    repeat_matrix,
    repeat_rows,
    repeat_similarity,
)
from cllm_spheres_bench.kernel_cases import Product, aligned, product_candidates  # noqa: E402
from cllm_spheres_bench.kernels import measure  # noqa: E402
from cllm_spheres_bench.machine import facts, markdown, results_folder, told, write_results  # noqa: E402

from cllm_spheres.crystal.gcd_lanes import GROUP  # noqa: E402
from cllm_spheres.machine import usable_cores  # noqa: E402

VOCABULARY = 50_304
DIMENSIONS = (64, 128, 256, 1024)
NUM_PAIRS = 1 << 14
SIDE = 256  # of a matrix: no call takes long
NEAR = 16  # rows of a table that stays in the caches
Ways = dict[str, Callable[[int], object]]


def pairs(dimensions: tuple[int, ...], vocabulary: int, num_pairs: int) -> Ways:
    """One pair at a time: three ways to a number, and dots of rows near and anywhere."""
    rng = np.random.default_rng(6)
    a_N, b_N = rng.integers(1, vocabulary + 1, (2, num_pairs))
    near_a_N, near_b_N = rng.integers(0, NEAR, (2, num_pairs))
    row_a_N, row_b_N, cursor = a_N - 1, b_N - 1, np.zeros(1, np.int64)
    ways: Ways = {
        "binary gcd": lambda times: repeat_binary(times, cursor, a_N, b_N),
        "Euclid's gcd": lambda times: repeat_euclid(times, cursor, a_N, b_N),
        "gcd and spiral": lambda times: repeat_similarity(times, cursor, a_N, b_N),
    }
    for d in dimensions:
        table_VD = aligned(vocabulary, d)
        ways[f"dot of {d}, in the cache"] = lambda times, t=table_VD: repeat_dots(times, cursor, near_a_N, near_b_N, t)
        ways[f"dot of {d}, anywhere"] = lambda times, t=table_VD: repeat_dots(times, cursor, row_a_N, row_b_N, t)
    return ways


def matrices(vocabulary: int, side: int) -> Ways:
    """gcds of all pairs of two lists of `side` numbers."""
    rng = np.random.default_rng(6)
    small = rng.integers(1, vocabulary + 1, (2, side))
    large = rng.integers(2**30, 2**31, (2, side))
    padded = {
        width: np.concatenate([numbers[1], np.zeros(-side % GROUP)]).astype(width)
        for width, numbers in ((np.uint16, small), (np.uint32, large))
    }
    out = np.empty((side, side), np.int32)
    sieved = np.empty(side, np.int32)
    return {
        "gcd, 16 bits": lambda times: repeat_matrix(times, small[0], padded[np.uint16], out),
        "gcd, 31 bits": lambda times: repeat_matrix(times, large[0], padded[np.uint32], out),
        "gcd, by divisors": lambda times: repeat_rows(times, side, sieved),
        "numpy's gcd": lambda times: [np.gcd.outer(*small.astype(np.int32), out=out) for _ in range(times)],
    }


def products(d: int, side: int) -> Ways:
    """Dots of all pairs of two lists of rows: a matrix product."""
    ways, _ = product_candidates(Product("", side, side, d, False, True), None)
    return ways


def run(
    out: Path | None, repeats: int, seconds: float, command: str, dimensions: tuple[int, ...] = DIMENSIONS,
    vocabulary: int = VOCABULARY, num_pairs: int = NUM_PAIRS, side: int = SIDE,
) -> tuple[Path, Path]:  # fmt: skip
    """Measure, print and write; the paths of both results."""
    folder, result = results_folder(out), facts(command)
    one_by_one = pairs(dimensions, vocabulary, num_pairs)
    all_pairs: Ways = matrices(vocabulary, side)
    for d in dimensions:
        all_pairs |= {f"{name}, {d}": way for name, way in products(d, side).items()}
    cores = usable_cores()
    os.sched_setaffinity(0, {max(cores)})
    try:
        result |= {
            "repeats": repeats, "seconds": seconds, "dimensions": list(dimensions), "vocabulary": vocabulary,
            "side": side, "pairs": summed_up(measure(one_by_one, PAIRS, seconds, repeats)),
            "matrix": summed_up(measure(all_pairs, side * side, seconds, repeats)),
        }  # fmt: skip
    finally:
        os.sched_setaffinity(0, cores)
    text = report(result)
    paths = write_results(folder, "gcd", result, text)
    print(text)
    print("Written:", ", ".join(map(str, paths)))
    return paths


def summed_up(rates: dict[str, Any]) -> dict[str, Any]:
    """Quartiles instead of all windows: there are hundreds."""
    return {
        name: {
            "median": rate["median"], "min": rate["min"], "max": rate["max"],
            "quartiles": np.percentile(rate["all"], [25, 75]).tolist(),
        }
        for name, rate in rates.items()
    }  # fmt: skip


def report(result: dict[str, Any]) -> str:
    """The tables, nanoseconds a pair, and how many times faster than a dot product a gcd is."""

    def ns(table: str, name: str) -> float:
        return 1 / result[table][name]["median"]

    def cell(table: str, name: str) -> str:
        rates = result[table][name]
        return f"{1 / rates['median']:.3g} ({1 / rates['quartiles'][1]:.3g} to {1 / rates['quartiles'][0]:.3g})"

    numbers = ("binary gcd", "Euclid's gcd", "gcd and spiral")
    grids = ("gcd, 16 bits", "gcd, 31 bits", "gcd, by divisors", "numpy's gcd")
    one, all_of_them = [], []
    for d in result["dimensions"]:
        for where in ("in the cache", "anywhere"):
            name = f"dot of {d}, {where}"
            ratios = (f"{ns('pairs', name) / ns('pairs', number):.2f}" for number in numbers)
            one.append([f"{d}, {where}", cell("pairs", name), *ratios])
        best = min((f"{way}, {d}" for way in ("ours", "OpenBLAS", "numpy")), key=lambda name: ns("matrix", name))
        ratios = (f"{ns('matrix', best) / ns('matrix', grid):.2f}" for grid in grids)
        all_of_them.append([f"{d}", *(cell("matrix", f"{way}, {d}") for way in ("ours", "OpenBLAS", "numpy")), *ratios])
    memory = f"{result['memory_bytes'] / 1e9:.1f} GB; {result['system']}, Python {result['python']}"
    return f"""# A greatest common divisor against a dot product

Nanoseconds a pair, median and quartiles of {result["repeats"]} windows of {result["seconds"]:g} s in turn, one thread;
then how many times as long as a gcd the dot product takes: above 1 the gcd is faster.

The two are not the same thing. A dot product compares what two vectors have learned; a gcd compares two ranks, and is
the same for every text and every model.

{result["machine"]}, {result["cores"]} cores, {memory}; commit {result["commit"]}, {result["date"]}

`{result["command"]}`

## One pair at a time

Calls in a jitted loop over random pairs of {result["vocabulary"]:,} tokens. The dot product goes 64 floats at a time;
its rows are {NEAR} that stay in the caches, or lie anywhere in a table of the whole vocabulary.

{markdown(["numbers", "ns a pair"], [[name, cell("pairs", name)] for name in numbers])}
{markdown(["dot product of", "ns a pair", *(f"to {name}" for name in numbers)], one)}
## A whole matrix

{result["side"]:,} x {result["side"]:,} pairs into 4 bytes each. gcd: binary, in lanes of 16 bits for numbers up to
{result["vocabulary"]:,}, of 32 for numbers below 2**31. "By divisors" takes both lists to be 1, 2, 3, ..., as ranks
are, and writes the multiples of each divisor. The ratios are to the fastest product.

{markdown(["numbers", "ns a pair"], [[name, cell("matrix", name)] for name in grids])}
{markdown(["dot products of", "ours", "OpenBLAS", "numpy", *(f"to {name}" for name in grids)], all_of_them)}"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=201)
    parser.add_argument("--seconds", type=float, default=0.002)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.repeats < 1 or not options.seconds > 0:
        parser.error("--repeats is a number from 1 on, --seconds one above 0")
    command = shlex.join(["python", "-m", "cllm_spheres_bench.gcd", *sys.argv[1:]])
    run(options.out, options.repeats, options.seconds, command)


if __name__ == "__main__":
    with told():
        main()
