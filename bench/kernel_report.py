"""The rates of every kernel by size, as JSON has them -> Markdown."""

from __future__ import annotations

from typing import Any

from cllm_spheres_bench.machine import markdown

from cllm_spheres.units import size as in_bytes

OURS = ("ours", "multiply", "project")
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
# table, dtype -> its title and its columns of rates
TABLES: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {
    ("products", "fp32"): ("Matrix products, float32, GFLOP/s", ("ours", "OpenBLAS", "numpy", "torch")),
    ("products", "bf16"): ("Matrix products, bfloat16, GFLOP/s", ("multiply", "project", "torch")),
    ("attention and head", "fp32"): (
        "Attention and head, float32, GFLOP/s", ("ours", "numpy", "torch", "torch matmul"),
    ),
    ("attention and head", "bf16"): ("Attention and head, bfloat16, GFLOP/s", ("ours", "torch", "torch matmul")),
    ("memory", "fp32"): ("Kernels that memory bounds, float32, GB/s", ("ours", "numpy", "torch")),
    ("memory", "bf16"): ("Kernels that memory bounds, with bfloat16, GB/s", ("ours", "torch")),
}  # fmt: skip


def ratio(rates: dict[str, Any]) -> float | None:
    """The median of our fastest over that of the fastest other; None where there is no other."""
    ours = [rates[name]["median"] for name in rates if name in OURS]
    others = [rates[name]["median"] for name in rates if name not in OURS]
    return max(ours) / max(others) if ours and others else None


def peak_of(row: dict[str, Any], result: dict[str, Any]) -> float | None:
    """What the core can do at most, in the row's unit: products of its dtype, or a triad over memory."""
    if row["table"] == "memory":
        return float(result["bandwidth_gb_per_s"]["triad"])
    found = result["peaks"].get(row["dtype"])
    return found["gflops"] if found else None


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}"


def _cell(rates: dict[str, Any], name: str) -> str:
    """Median and range."""
    if name not in rates:
        return "–"
    found = rates[name]
    return f"{_rate(found['median'])} ({_rate(found['min'])} to {_rate(found['max'])})"


def _row(size: str, row: dict[str, Any], result: dict[str, Any], columns: tuple[str, ...]) -> list[str]:
    rates, found, peak = row["rates"], ratio(row["rates"]), peak_of(row, result)
    best = max(rates[name]["median"] for name in rates if name in OURS)
    return [
        size, row["name"], row["sizes"], *(_cell(rates, name) for name in columns),
        f"**{found:.2f}**" if found else "–", f"{best / peak:.0%}" if peak else "–",
    ]  # fmt: skip


def report(results: dict[str, dict[str, Any]]) -> str:
    """The whole page. results: by the name of the size."""
    parts = ["# Kernels alone, on one core\n", _METHOD]
    if any(not result["torch"] for result in results.values()):
        parts.append("PyTorch was not installed for every size: where it was not, its columns are empty.\n")
    if not any(row["dtype"] == "bf16" for result in results.values() for row in result["rows"]):
        parts.append("This CPU has no bfloat16 arithmetic: there are no tables of it.\n")
    parts += ["## Sizes, and the core's peaks\n", _sizes(results)]
    for (table, dtype), (title, columns) in TABLES.items():
        rows = [
            _row(size, row, result, columns)
            for size, result in results.items()
            for row in result["rows"]
            if (row["table"], row["dtype"]) == (table, dtype)
        ]
        if rows:
            head = ["size", "kernel", "of", *columns, "ours to the best other", "of the peak"]
            parts += [f"## {title}\n", markdown(head, rows)]
    return "\n".join(parts)


_METHOD = """Median and range of the windows of each way to compute the same, in turn (A B C A B C), on the same core.
Ours and OpenBLAS are called in jitted loops, where a call costs nothing; numpy and PyTorch (one thread) in a loop of
Python, whose calls are part of their time: that counts at S1, whose kernels take microseconds, not at the others.
Nothing is moved out of the caches between calls: kernels whose arrays they hold go beyond the memory's peak. Sizes of
a product: rows x columns x inner, with as many rows as a sphere's shard of two spheres computes together.

float32: `ours` is the product of kernels/products.py; torch is torch.mm, MKL's. bfloat16: `multiply` is the product
into float32 from packed forms, `project` the same with the ending the model gives it (bias, GELU or its slope,
residual, rounding into tiles); both count operations without padding. The head's products go chunk by chunk through
the vocabulary, as the model does; logits are not kept. torch.mm takes and gives bfloat16. Attention: causal, half of
the scores count; backward twice the forward; `torch` is scaled_dot_product_attention, `torch matmul` the same as
products. Head: logits and both gradients count, what is computed again does not; torch goes through autograd.
Bytes are those that a kernel must read and write once, whatever it moves besides: a line that is written is read first,
which counts nowhere. The peak of products is the best of several large ones by ours, torch.mm and numpy, that of memory
a triad over arrays of 512 MB. Packing has no other.
"""


def _sizes(results: dict[str, dict[str, Any]]) -> str:
    head = [
        "size", "float32, GFLOP/s", "bfloat16, GFLOP/s", "reading, GB/s", "triad, GB/s", "turns x s", "PyTorch",
        "commit", "date",
    ]  # fmt: skip
    rows = []
    for name, r in results.items():
        peaks = [f"{r['peaks'][d]['gflops']:,.0f}" if d in r["peaks"] else "–" for d in DTYPE_NAMES]
        plain = r["bandwidth_gb_per_s"]
        rows.append([
            name, *peaks, f"{plain['read']:.1f}", f"{plain['triad']:.1f}", f"{r['repeats']} x {r['seconds']:g}",
            r["torch"] or "–", r["commit"], r["date"],
        ])  # fmt: skip
    machines = dict.fromkeys(
        f"{r['machine']}, {r['cores']} cores, {in_bytes(r['memory_bytes'])}; {r['system']}, Python {r['python']}\n"
        for r in results.values()
    )
    commands = "".join(f"- {name}: `{r['command']}`; {r['describe']}\n" for name, r in results.items())
    return "\n".join([*machines, markdown(head, rows), commands])
