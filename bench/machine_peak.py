"""This machine -> the most GFLOP/s that a matrix product reaches, float32 and bf16, on one core and on several.

    python -m cllm_spheres_bench.machine_peak PARENT_PID THREADS

prints {"fp32": {"gflops", "shape", "by"}, "bf16": ...} as JSON. The best of several large products by our own kernels,
by torch.mm, and by numpy in float32: whoever is fastest on this CPU says what can be reached on it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Shape = tuple[int, int, int]

# Rows, inner, columns: squares, and the products of a feed-forward layer.
PRODUCTS = (
    (1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 4096), (2048, 768, 3072), (1024, 4096, 1024),
)  # fmt: skip
SECONDS = 0.7  # of each product: long enough for a second core to wake and for a clock to settle


def best_gflops(product: Callable[[], object], flops: int, seconds: float = SECONDS) -> float:
    """The fastest single call within some seconds, after one that is not counted."""
    product()
    shortest, until = float("inf"), time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        product()
        shortest = min(shortest, time.perf_counter() - began)
    return flops / shortest * 1e-9


def our_products(shape: Shape, pool: ThreadPoolExecutor, threads: int) -> dict[str, Callable[[], object]]:
    """A product of ours in each dtype that this CPU computes in, its rows shared out to threads."""
    import numpy as np
    from cllm_spheres_bench.kernel_loops import repeat_gemm

    from cllm_spheres.kernels.sizes import product_floats
    from cllm_spheres.model import dtypes

    m, k, n = shape
    rows = m // threads
    rng = np.random.default_rng(0)
    scratch = np.zeros((threads, product_floats(max(shape))), np.float32)
    a, b = rng.standard_normal((m, k), np.float32), rng.standard_normal((k, n), np.float32)
    out = np.empty((m, n), np.float32)

    def in_float32(i: int) -> None:
        left, target = a[i * rows :].ctypes.data, out[i * rows :].ctypes.data
        repeat_gemm(1, False, False, rows, n, k, left, k, b.ctypes.data, n, target, n, scratch[i].ctypes.data)

    products: dict[str, Callable[[], object]] = {"fp32": lambda: list(pool.map(in_float32, range(threads)))}
    if dtypes.usable("bf16") == "bf16":
        from cllm_spheres_bench.kernel_loops_bf16 import repeat_multiply

        x, y = ((array.view(np.uint32) >> 16).astype(np.uint16) for array in (a, b))

        def in_bf16(i: int) -> None:
            left, target = x[i * rows :].ctypes.data, out[i * rows :].ctypes.data
            repeat_multiply(1, rows, n, k, left, y.ctypes.data, target, scratch[i].ctypes.data)

        products["bf16"] = lambda: list(pool.map(in_bf16, range(threads)))
    return products


def measure(threads: int) -> dict[str, Any]:
    """The peaks on a number of threads, in this process, whose environment must have capped numpy's."""
    import numpy as np

    best: dict[str, Any] = {}

    def take(dtype: str, by: str, product: Callable[[], object], shape: Shape) -> None:
        gflops = best_gflops(product, 2 * shape[0] * shape[1] * shape[2])
        if gflops > best.get(dtype, {"gflops": 0})["gflops"]:
            best[dtype] = {"gflops": gflops, "shape": shape, "by": by}

    rng = np.random.default_rng(0)
    torch: Any = None
    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(threads)
    pool = ThreadPoolExecutor(threads)
    for shape in PRODUCTS:
        for dtype, product in our_products(shape, pool, threads).items():
            take(dtype, "cllm-spheres", product, shape)
        m, k, n = shape
        a, b = rng.standard_normal((m, k), np.float32), rng.standard_normal((k, n), np.float32)
        out = np.empty((m, n), np.float32)
        take("fp32", "numpy", lambda a=a, b=b, out=out: np.matmul(a, b, out=out), shape)
        if torch is None:
            continue
        for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            x, y = torch.from_numpy(a).to(kind), torch.from_numpy(b).to(kind)
            z = torch.empty(m, n, dtype=kind)
            take(dtype, "torch.mm", lambda x=x, y=y, z=z: torch.mm(x, y, out=z), shape)
    return best


def measured(threads: int) -> dict[str, Any]:
    """`measure` in a process of its own, with the thread caps set before numpy loads."""
    from cllm_spheres_bench.children import child

    from cllm_spheres.errors import RunFailed
    from cllm_spheres.spheres.serving import THREAD_CAPS

    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        caps = dict.fromkeys(THREAD_CAPS, str(threads))
        with child(
            "cllm_spheres_bench.machine_peak", str(os.getpid()), str(threads), errors=said, environment=caps
        ) as process:
            code = process.wait(timeout=300)
        text = said.read_text(errors="replace")
    if code:
        raise RunFailed(f"Measuring the peak of matrix products ended with exit code {code}:\n{text[-2000:]}")
    return json.loads(text.splitlines()[-1])


def main() -> None:
    """Measure and print."""
    from cllm_spheres_bench.children import end_with

    end_with(int(sys.argv[1]))
    print(json.dumps(measure(int(sys.argv[2]))))


if __name__ == "__main__":
    main()
