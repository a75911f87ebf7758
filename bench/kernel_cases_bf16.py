"""A size -> its bfloat16 kernels and matrix products, ours and PyTorch's; as kernel_cases.py.

Ours work on forms padded to 32 (kernels/bf16/tiles.py): N rows with padded sequences, H E columns of padded heads.
Forms hold random numbers in no order: a form is a permutation, and its order does not change its time. Operations are
counted without padding, so that what padding costs lowers our rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from cllm_spheres_bench import kernel_loops_bf16 as loops
from cllm_spheres_bench import kernel_peers as peers
from cllm_spheres_bench.kernel_cases import (
    MEMORY,
    MODEL_PARTS,
    PRODUCTS,
    Candidates,
    Case,
    Product,
    aligned,
    attention_flops,
    filled,
    head_flops,
    keeping,
    products,
    shard_sequences,
)
from cllm_spheres_bench.sizes import Size

from cllm_spheres.kernels.bf16.linear import THROUGH_GELU, TO_GELU, TO_RESIDUAL, TO_ROWS
from cllm_spheres.kernels.bf16.sizes import CHUNK, attention_bytes, kept_logits, padded
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.rules.bf16 import packing, sequences_at_a_time
from cllm_spheres.model.shape import Shape

# A layer's products that end in something else than float32, and with what: qkv and projection, up and down.
ENDINGS = {
    "qkv": TO_ROWS, "projection": TO_RESIDUAL, "projection dx": TO_ROWS, "up": TO_GELU, "down": TO_RESIDUAL,
    "down dx": THROUGH_GELU,
}  # fmt: skip


def form(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random bfloat16s of a form of [rows, columns], padded, on a cache line."""
    count = padded(rows) * padded(columns)
    result = filled(count // 2).view(np.uint16)
    for first in range(0, count, 1 << 22):
        part = aligned(min(1 << 22, count - first), seed=seed)
        result[first : first + part.size] = part.view(np.uint32) >> 16
    return result


def tall(shape: Shape, rows: int) -> int:
    """Rows with each sequence padded."""
    return rows // shape.block_size * padded(shape.block_size)


def columns_of_heads(shape: Shape) -> int:
    """Columns of all heads, each padded."""
    return shape.heads * padded(shape.width // shape.heads)


def layer_candidates(p: Product, shape: Shape, rows: int, torch: Any) -> Candidates:
    """A product of a layer: plain, with its ending where the model gives it one, and torch.mm."""
    h, n = columns_of_heads(shape), tall(shape, rows)
    ours = {
        "qkv": (shape.width, 3 * h), "projection": (h, shape.width), "up": (shape.width, shape.ff_width),
        "down": (shape.ff_width, shape.width),
    }  # fmt: skip
    i, o = ours[p.name.split()[0]]
    m, columns, inner = {"dx": (n, i, o), "dw": (i, o, n)}.get(p.name.partition(" ")[2], (n, o, i))
    a, b = form(m, inner), form(columns, inner, seed=1)
    out, scratch = filled(m, columns), filled(32 * CHUNK)
    fixed = m, columns, padded(inner), a.ctypes.data, b.ctypes.data
    found: Candidates = {
        "multiply": lambda times: loops.repeat_multiply(times, *fixed, out.ctypes.data, scratch.ctypes.data)
    }
    if p.name in ENDINGS:
        ending, wide = ENDINGS[p.name], padded(columns)
        bias, sums = filled(wide), filled(wide)
        first, second = filled(m, wide), filled(m, wide)  # room for float32, more than forms need
        has_bias = "dx" not in p.name
        found["project"] = lambda times: loops.repeat_project(
            times, ending, *fixed, bias.ctypes.data if has_bias else 0, first.ctypes.data, second.ctypes.data,
            columns if ending == TO_RESIDUAL else wide, scratch.ctypes.data,
            sums.ctypes.data if ending == THROUGH_GELU else 0, padded(shape.block_size),
        )  # fmt: skip
    found = {name: keeping(way, a, b) for name, way in found.items()}
    if torch:
        found["torch"] = torch_product(p, torch)
    return found


def torch_product(p: Product, torch: Any) -> peers.Way:
    """torch.mm in bfloat16, with the operands stored as nn.Linear's would be."""
    a = torch.from_numpy(aligned(*((p.k, p.m) if p.transpose_a else (p.m, p.k)), seed=1)).to(torch.bfloat16)
    b = torch.from_numpy(aligned(*((p.n, p.k) if p.transpose_b else (p.k, p.n)), seed=2)).to(torch.bfloat16)
    x, y = a.T if p.transpose_a else a, b.T if p.transpose_b else b
    out = torch.empty(p.m, p.n, dtype=torch.bfloat16)
    return peers.again(lambda: torch.mm(x, y, out=out))


def head_candidates(p: Product, shape: Shape, rows: int, torch: Any) -> Candidates:
    """A product of the head, a chunk of the vocabulary at a time as the model computes it, and torch.mm at once."""
    n, c, v = tall(shape, rows), shape.width, shape.vocab_size
    x, chunk, wte, scratch = form(n, c), form(n, CHUNK, seed=1), form(v, c, seed=2), filled(32 * CHUNK)
    x_at, chunk_at, wte_at, scratch_at = (array.ctypes.data for array in (x, chunk, wte, scratch))
    out = filled(*((v, c) if p.name == "head dw" else (n, c)))
    ways: Candidates = {
        "head logits": lambda times: loops.repeat_head_logits(times, n, padded(c), v, x_at, wte_at, scratch_at),
        "head dx": lambda times: loops.repeat_head_dx(times, n, c, v, chunk_at, wte_at, out.ctypes.data, scratch_at),
        "head dw": lambda times: loops.repeat_head_dw(times, n, c, v, chunk_at, x_at, out.ctypes.data, scratch_at),
    }
    found: Candidates = {"multiply": keeping(ways[p.name], x, chunk, wte, scratch)}
    if torch:
        found["torch"] = torch_product(p, torch)
    return found


def cases(size: Size, torch: Any) -> Iterator[Case]:
    """All bfloat16 kernels of a size. torch: the module, or None where it is not installed."""
    s = size.shape
    layout = Layout(s)
    sequences = min(sequences_at_a_time(s), shard_sequences(size))
    n, c, v = sequences * s.block_size, s.width, s.vocab_size
    for p in products(s, n, n):
        build = head_candidates if p.name.startswith("head") else layer_candidates
        yield Case(PRODUCTS, "bf16", p.name, f"{p.m} x {p.n} x {p.k}", p.flops,
                   lambda p=p, build=build: build(p, s, n, torch))  # fmt: skip
    heads, flops = f"{sequences} x {s.heads} heads, {s.block_size} x {c // s.heads}", attention_flops(s, sequences)
    yield Case(MODEL_PARTS, "bf16", "attention", heads, flops, lambda: _attention(s, sequences, torch)[0])
    yield Case(MODEL_PARTS, "bf16", "attention backward", heads, 2 * flops, lambda: _attention(s, sequences, torch)[1])
    yield Case(
        MODEL_PARTS, "bf16", "head, loss and gradients", f"{n} x {c}, {v:,}", head_flops(s, n),
        lambda: _head(s, n, torch),
    )  # fmt: skip
    yield Case(MEMORY, "bf16", "layer norm into tiles", f"{n} x {c}", 6 * n * c, lambda: _layernorm(n, c, torch))
    weights = packing(layout)
    read = sum(4 * placed.size for placed in layout.tensors if placed.name in weights.places)
    yield Case(
        MEMORY, "bf16", "packing of the weights", f"{read / 4e6:,.1f} M parameters", read + weights.size_bytes,
        lambda: _pack(layout),
    )  # fmt: skip


def _attention(s: Shape, sequences: int, torch: Any) -> tuple[Candidates, Candidates]:
    t, d, h = padded(s.block_size), s.width // s.heads, columns_of_heads(s)
    n = sequences * t
    qkv, dout, out, dqkv = form(n, 3 * h), form(n, h, seed=1), form(n, h), form(n, 3 * h)
    lse, scratch = filled(n * s.heads), filled(attention_bytes(t, padded(d)) // 4)

    def forward(times: int) -> None:
        loops.repeat_attention_forward(
            times, qkv.ctypes.data, sequences, t, s.heads, d, s.block_size, scratch.ctypes.data, out.ctypes.data,
            lse.ctypes.data,
        )  # fmt: skip

    def backward(times: int) -> None:
        loops.repeat_attention_backward(
            times, dout.ctypes.data, qkv.ctypes.data, out.ctypes.data, lse.ctypes.data, sequences, t, s.heads, d,
            s.block_size, scratch.ctypes.data, dqkv.ctypes.data,
        )  # fmt: skip

    forward(1)
    first: Candidates = {"ours": forward}
    second: Candidates = {"ours": backward}
    if torch:
        rows = sequences * s.block_size
        plain, gradient = aligned(rows, 3 * s.width), aligned(rows, s.width, seed=1)
        for name, pair in peers.torch_attention(torch, plain, gradient, sequences, s.heads, torch.bfloat16).items():
            first[name], second[name] = pair
    return first, second


def _head(s: Shape, rows: int, torch: Any) -> Candidates:
    n, c, v = tall(s, rows), s.width, s.vocab_size
    x, x_pairs = form(n, c), form(n, c, seed=1)
    small = filled(padded(v) * padded(c) // 2).view(np.uint16)
    for first in range(0, small.size, 1 << 22):
        part = aligned(min(1 << 22, small.size - first), scale=0.02)
        small[first : first + part.size] = part.view(np.uint32) >> 16
    chunk = min(CHUNK, padded(v))
    turned, logits, dx, dwte = form(n, chunk), form(n, chunk), filled(n, c), filled(v, c)
    stats, scratch, kept = filled(5 * n + 2), filled(32 * CHUNK), filled(max(1, kept_logits(n, v)))
    targets = np.full((rows // s.block_size, padded(s.block_size)), -1, np.int32)  # -1: padding
    targets[:, : s.block_size] = np.random.default_rng(2).integers(0, v, (len(targets), s.block_size))

    def ours(times: int) -> None:
        # Both forms of the embedding are a permutation of the same numbers, and here the same.
        kept_at = kept.ctypes.data if kept_logits(n, v) else 0
        loops.repeat_head(
            times, x.ctypes.data, x_pairs.ctypes.data, c, small.ctypes.data, small.ctypes.data, v, n,
            targets.ctypes.data, stats.ctypes.data, scratch.ctypes.data, kept_at, logits.ctypes.data,
            turned.ctypes.data, dx.ctypes.data, dwte.ctypes.data, 1 / rows,
        )  # fmt: skip

    found: Candidates = {"ours": ours}
    if torch:
        plain, wte = aligned(rows, c), aligned(v, c, scale=0.02, seed=1)
        real = np.ascontiguousarray(targets[:, : s.block_size]).reshape(-1)
        found["torch"] = peers.torch_head(torch, plain, wte, real, torch.bfloat16)
    return found


def _layernorm(n: int, c: int, torch: Any) -> Candidates:
    x, gain, bias = aligned(n, c), filled(c, value=1), filled(c)
    mean, rstd, row, target = filled(n), filled(n), filled(padded(c)), form(n, c)
    found: Candidates = {
        "ours": lambda times: loops.repeat_layernorm_rows(times, x, gain, bias, target.ctypes.data, mean, rstd, row)
    }
    if torch:
        y, g, b = (torch.from_numpy(a) for a in (x, gain, bias))
        norm = torch.nn.functional.layer_norm
        found["torch"] = peers.again(lambda: norm(y, [c], g, b).to(torch.bfloat16))
    return found


def _pack(layout: Layout) -> Candidates:
    """Ours alone: no other keeps its weights in two packed forms."""
    weights = packing(layout)
    params, room = aligned(layout.size), filled(-(-weights.size_bytes // 4))

    def ours(times: int) -> None:
        loops.repeat_pack(times, weights.address, params.ctypes.data, room.ctypes.data, weights.units)

    return {"ours": ours}
