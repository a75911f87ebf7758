"""python bench/step_time.py --preset medium

Where the time of a training step goes: each kernel alone at the shapes of a preset, on one core, times how often a
sequence needs it, beside the measured time of the whole shard. Writes a Markdown table to bench/results/.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cllm_spheres.config import PRESETS, build, preset_values
from cllm_spheres.kernels.attention import attention_backward, attention_forward
from cllm_spheres.kernels.blas import description
from cllm_spheres.kernels.cross_entropy import head_loss_backward
from cllm_spheres.kernels.gelu import gelu_backward, gelu_forward
from cllm_spheres.kernels.layernorm import layernorm_backward, layernorm_forward
from cllm_spheres.kernels.linear import linear_backward, linear_forward
from cllm_spheres.kernels.sizes import PROGRESS_WORDS, attention_floats, product_floats
from cllm_spheres.model import geometry as G
from cllm_spheres.model.geometry import geometry, new_arena, sequences_at_a_time
from cllm_spheres.model.gpt import compute_shard
from cllm_spheres.model.layout import Layout, Shape

RESULTS = Path(__file__).parent / "results"


def median_s(call: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def floats(*shape: int) -> np.ndarray:
    """Numbers that are neither zero nor subnormal."""
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def kernels(shape: Shape, sequences: int) -> dict[str, tuple[int, Callable[[], object]]]:
    """Name -> how often a group of sequences needs it, and a call."""
    n, c, f, layers, t, h = (
        sequences * shape.block_size, shape.width, shape.ff_width, shape.layers, shape.block_size, shape.heads,
    )  # fmt: skip
    x, ff, qkv = floats(n, c), floats(n, f), floats(n, 3 * c)
    gain, bias, mean, rstd = floats(c), floats(c), np.empty(n, np.float32), np.empty(n, np.float32)
    lse, scratch, zero = np.empty(n * h, np.float32), np.empty(attention_floats(t), np.float32), np.uint64(0)
    one = np.float32(1)
    product_scratch = np.empty(product_floats(max(n, f, shape.vocab_size)), np.float32)
    products = product_scratch.ctypes.data
    rows = int(geometry(Layout(shape), largest_shard=sequences).array[G.HEAD_ROWS])
    wte, logits, ids = (
        floats(shape.vocab_size, c),
        np.empty((rows, shape.vocab_size), np.float32),
        np.zeros(n, np.int32),
    )
    calls: dict[str, tuple[int, Callable[[], object]]] = {}
    for i, o in ((c, 3 * c), (c, c), (c, f), (f, c)):
        w, b, into = floats(i, o) * np.float32(0.02), floats(o), floats(n, o)
        source, dx, dw = floats(n, i), floats(n, i), floats(i, o)
        calls[f"linear {i} to {o}, forward"] = (
            layers,
            lambda s=source, w=w, b=b, y=into: linear_forward(s, w, b, y, products),
        )
        calls[f"linear {i} to {o}, backward"] = (
            layers,
            lambda y=into, s=source, w=w, dx=dx, dw=dw, b=b: linear_backward(y, s, w, dx, dw, b, False, products),
        )  # fmt: skip
    out, dqkv = floats(n, c), floats(n, 3 * c)
    calls["attention, forward"] = (
        layers, lambda: attention_forward(qkv, t, h, zero, 0, 0, one, scratch, out, lse),
    )  # fmt: skip
    calls["attention, backward"] = (
        layers, lambda: attention_backward(x, qkv, out, lse, t, h, zero, 0, 0, one, scratch, dqkv),
    )  # fmt: skip
    calls["layer norm, forward"] = (2 * layers + 1, lambda: layernorm_forward(x, gain, bias, out, mean, rstd))
    calls["layer norm, backward"] = (
        2 * layers + 1, lambda: layernorm_backward(out, x, gain, mean, rstd, floats_dx, gain.copy(), bias.copy(), True),
    )  # fmt: skip
    floats_dx = floats(n, c)
    act = np.empty(n * f, np.float32)
    calls["gelu, forward"] = (layers, lambda: gelu_forward(ff.reshape(-1), act))
    calls["gelu, backward"] = (layers, lambda: gelu_backward(ff.reshape(-1), act))
    head_x = x * np.float32(0.1)
    calls["head, loss and both gradients"] = (
        1, lambda: head_loss_backward(head_x, wte, ids, one, 0, logits, floats_dx, wte_gradient, False, products),
    )  # fmt: skip
    wte_gradient = floats(shape.vocab_size, c)
    return calls


def whole_s(shape: Shape, sequences: int, repeats: int) -> float:
    """Seconds of the compiled shard for a group of sequences."""
    layout = Layout(shape)
    card = geometry(layout, largest_shard=sequences)
    params, segment, arena = (
        floats(layout.size) * np.float32(0.02),
        np.empty(layout.size, np.float32),
        new_arena(card.arena_floats),
    )
    ids = np.zeros((2, sequences, shape.block_size), np.int32)
    progress = np.zeros(PROGRESS_WORDS, np.int64)
    return median_s(
        lambda: compute_shard.call(
            card.array.ctypes.data, params.ctypes.data, 0, segment.ctypes.data, arena.ctypes.data, ids[0].ctypes.data,
            ids[1].ctypes.data, sequences, shape.block_size, 1.0 / ids[0].size, 0, 0, 0, 0,
            progress.ctypes.data,
        ),
        repeats,
    )  # fmt: skip


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="medium")
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    config = build(preset_values(arguments.preset))
    shape = Shape(
        config.vocab_size or 257, config.block_size, config.layers, config.heads, config.width,
        config.ff_width or 4 * config.width, config.bias,
    )  # fmt: skip
    sequences = min(
        sequences_at_a_time(shape.block_size, shape.width), -(-(config.batch_size or 1) // (config.spheres or 1))
    )
    whole = whole_s(shape, sequences, arguments.repeats)
    rows, total = [], 0.0
    for name, (count, call) in kernels(shape, sequences).items():
        seconds = median_s(call, arguments.repeats) * count
        total += seconds
        rows.append((seconds, f"| {name} | {count} | {seconds * 1e3:.2f} | {seconds / whole:.1%} |"))
    lines = [
        f"# Where a shard's time goes: {arguments.preset}", "",
        f"{sequences} sequence(s) of {shape.block_size} tokens on one core, {description()}, median of"
        f" {arguments.repeats}; `python bench/step_time.py --preset {arguments.preset}`.", "",
        "| kernel | calls | ms | share |", "|---|---|---|---|", *(row for _, row in sorted(rows, reverse=True)),
        f"| the rest (embedding, residuals, what caches do between kernels) | | {(whole - total) * 1e3:.2f} |"
        f" {(whole - total) / whole:.1%} |",
        f"| **the whole shard** | | **{whole * 1e3:.2f}** | {sequences * shape.block_size / whole:,.0f} tokens/s |",
    ]  # fmt: skip
    text = "\n".join(lines) + "\n"
    print(text)
    (RESULTS / f"step_time_{arguments.preset}.md").write_text(text)


if __name__ == "__main__":
    main()
