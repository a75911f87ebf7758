"""A size -> its float32 kernels and matrix products, each with the ways to compute it: ours and the others'.

N rows that are computed together, C channels, F of the feed-forward, V vocabulary, R rows whose logits exist at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from cllm_spheres_bench import kernel_loops as loops
from cllm_spheres_bench import kernel_peers as peers
from cllm_spheres_bench.scaling_model import gather_bytes, update_bytes
from cllm_spheres_bench.sizes import Size

from cllm_spheres.kernels.optimizer import (
    D_BETA1,
    D_BETA2,
    D_CORRECTION_1,
    D_CORRECTION_2,
    D_DECAY,
    D_FACTOR,
    D_LR,
    DECISION_WORDS,
)
from cllm_spheres.kernels.sizes import BLOCK, SLOT_FLOATS, attention_floats, product_floats
from cllm_spheres.model.arena import new_arena
from cllm_spheres.model.description import Linear
from cllm_spheres.model.families import described
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.rules.fp32 import head_rows, sequences_at_a_time
from cllm_spheres.model.shape import Shape

PRODUCTS, MODEL_PARTS, MEMORY = "products", "attention and head", "memory"
SPHERES = 2  # as bench peers trains on two cores
Candidates = dict[str, Callable[[int], object]]


@dataclass(frozen=True)
class Case:
    """One line of a table. `work`: operations or bytes of a call; `build` makes the ways to compute it, by name."""

    table: str
    dtype: str
    name: str
    sizes: str
    work: int
    build: Callable[[], Candidates]


@dataclass(frozen=True)
class Product:
    """c[m, n] = op(a) op(b) over k; which operands are transposed."""

    name: str
    m: int
    n: int
    k: int
    transpose_a: bool
    transpose_b: bool

    @property
    def flops(self) -> int:
        """A multiplication and an addition for each element and each k."""
        return 2 * self.m * self.n * self.k


def shard_sequences(size: Size) -> int:
    """Sequences of a sphere."""
    assert size.config.batch_size is not None
    return -(-size.config.batch_size // SPHERES)


def products(shape: Shape, rows: int, rows_of_head: int) -> list[Product]:
    """Every different matrix product of a layer and of the head, forward and for both gradients."""
    c, found = shape.width, []
    for step in described(shape).steps:
        if not isinstance(step, Linear) or step.block != 0:
            continue
        name, i, o = step.label.rpartition(" ")[2], step.x.width, step.out.width
        found += [
            Product(name, rows, o, i, False, False), Product(f"{name} dx", rows, i, o, False, True),
            Product(f"{name} dw", i, o, rows, True, False),
        ]  # fmt: skip
    v = shape.vocab_size
    return [
        *found, Product("head logits", rows_of_head, v, c, False, True),
        Product("head dx", rows_of_head, c, v, False, False), Product("head dw", v, c, rows_of_head, True, False),
    ]  # fmt: skip


def attention_flops(shape: Shape, sequences: int) -> int:
    """Of the forward: two products of T x T x width, of which a causal mask needs half. The backward's are twice."""
    return 2 * sequences * shape.block_size**2 * shape.width


def head_flops(shape: Shape, rows: int) -> int:
    """Logits and both gradients; what is computed again does not count."""
    return 3 * 2 * rows * shape.width * shape.vocab_size


def aligned(*dims: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    """Random float32 on a cache line, as in an arena."""
    array = new_arena(int(np.prod(dims)))
    np.random.default_rng(seed).standard_normal(dtype=np.float32, out=array)
    array *= np.float32(scale)
    return array.reshape(dims)


def filled(*dims: int, value: float = 0.0) -> np.ndarray:
    """float32 of one value on a cache line, its pages taken."""
    array = new_arena(int(np.prod(dims)))
    array.fill(value)
    return array.reshape(dims)


def keeping(way: Callable[[int], object], *arrays: np.ndarray) -> Callable[[int], object]:
    """A way that knows its arrays by their addresses alone -> one with which they live."""

    def kept(times: int, _: tuple[np.ndarray, ...] = arrays) -> object:
        return way(times)

    return kept


def product_candidates(p: Product, torch: Any) -> tuple[Candidates, dict[str, np.ndarray]]:
    """The ways to compute a float32 product, each into an output of its own, and those outputs."""
    a = aligned(*((p.k, p.m) if p.transpose_a else (p.m, p.k)), seed=1)
    b = aligned(*((p.n, p.k) if p.transpose_b else (p.k, p.n)), seed=2)
    names = ["ours", "OpenBLAS", "numpy", *(["torch"] if torch else [])]
    outputs = {name: filled(p.m, p.n) for name in names}
    scratch = filled(product_floats(max(p.m, p.n, p.k)))
    fixed = (
        int(p.transpose_a), int(p.transpose_b), p.m, p.n, p.k, a.ctypes.data, a.shape[1], b.ctypes.data, b.shape[1],
    )  # fmt: skip
    at = {name: out.ctypes.data for name, out in outputs.items()}
    left, right = a.T if p.transpose_a else a, b.T if p.transpose_b else b
    ways: Candidates = {
        "ours": keeping(
            lambda times: loops.repeat_gemm(times, *fixed, at["ours"], p.n, scratch.ctypes.data), a, b, outputs["ours"]
        ),
        "OpenBLAS": keeping(
            lambda times: loops.repeat_openblas(times, *fixed, at["OpenBLAS"], p.n), a, b, outputs["OpenBLAS"]
        ),
        "numpy": peers.again(lambda: np.matmul(left, right, out=outputs["numpy"])),
    }
    if torch:
        x, y, z = (torch.from_numpy(array) for array in (left, right, outputs["torch"]))
        ways["torch"] = peers.again(lambda: torch.mm(x, y, out=z))
    return ways, outputs


def cases(size: Size, torch: Any) -> Iterator[Case]:
    """All float32 kernels of a size. torch: the module, or None where it is not installed."""
    s = size.shape
    sequences = min(sequences_at_a_time(s), shard_sequences(size))
    n, c, f, v = sequences * s.block_size, s.width, s.ff_width, s.vocab_size
    r = head_rows(n, v)
    for p in products(s, n, r):
        yield Case(
            PRODUCTS, "fp32", p.name, f"{p.m} x {p.n} x {p.k}", p.flops, lambda p=p: product_candidates(p, torch)[0]
        )
    heads = f"{sequences} x {s.heads} heads, {s.block_size} x {c // s.heads}"
    flops = attention_flops(s, sequences)
    yield Case(MODEL_PARTS, "fp32", "attention", heads, flops, lambda: _attention(s, sequences, torch)[0])
    yield Case(MODEL_PARTS, "fp32", "attention backward", heads, 2 * flops, lambda: _attention(s, sequences, torch)[1])
    yield Case(
        MODEL_PARTS, "fp32", "head, loss and gradients", f"{n} x {c}, {v:,}", head_flops(s, n),
        lambda: _head(s, n, r, torch),
    )  # fmt: skip
    for name, floats, forward in (("layer norm", 2, True), ("layer norm backward", 4, False)):
        yield Case(MEMORY, "fp32", name, f"{n} x {c}", 4 * floats * n * c,
                   lambda forward=forward: _layernorm(n, c, torch)[0 if forward else 1])  # fmt: skip
    for name, floats, forward in (("GELU", 2, True), ("GELU backward", 3, False)):
        yield Case(MEMORY, "fp32", name, f"{n} x {f}", 4 * floats * n * f,
                   lambda forward=forward: _gelu(n * f, torch)[0 if forward else 1])  # fmt: skip
    yield Case(MEMORY, "fp32", "softmax, cross-entropy", f"{r} x {v:,}", 8 * r * v, lambda: _softmax(r, v, torch))
    size_P = Layout(s).size
    what = f"{size_P / 1e6:,.1f} M parameters"
    yield Case(
        MEMORY, "fp32", f"gather of {SPHERES}", what, gather_bytes(size_P, SPHERES), lambda: _gather(size_P, torch)
    )
    # From a gradient that lies in one place, as it does with many spheres.
    moved = update_bytes(size_P, 1, True)
    yield Case(MEMORY, "fp32", "AdamW update", what, moved, lambda: _update(size_P, torch))


def _attention(s: Shape, sequences: int, torch: Any) -> tuple[Candidates, Candidates]:
    n, c, t = sequences * s.block_size, s.width, s.block_size
    qkv, dout, out, dqkv = aligned(n, 3 * c), aligned(n, c, seed=1), filled(n, c), filled(n, 3 * c)
    lse, scratch = filled(n * s.heads), filled(attention_floats(t))
    keep = np.float32(1)

    def forward(times: int) -> None:
        loops.repeat_attention_forward(times, qkv, t, s.heads, scratch, out, lse, keep)

    def backward(times: int) -> None:
        loops.repeat_attention_backward(times, dout, qkv, out, lse, t, s.heads, scratch, dqkv, keep)

    forward(1)
    ways, back = peers.numpy_attention(qkv, dout, sequences, s.heads)
    first: Candidates = {"ours": forward, "numpy": ways}
    second: Candidates = {"ours": backward, "numpy": back}
    if torch:
        for name, (one, two) in peers.torch_attention(torch, qkv, dout, sequences, s.heads, torch.float32).items():
            first[name], second[name] = one, two
    return first, second


def _head(s: Shape, n: int, r: int, torch: Any) -> Candidates:
    c, v = s.width, s.vocab_size
    x, wte, dx, dwte, logits = (
        aligned(n, c),
        aligned(v, c, scale=0.02, seed=1),
        filled(n, c),
        filled(v, c),
        filled(r, v),
    )
    targets = np.random.default_rng(2).integers(0, v, n).astype(np.int32)
    scratch = filled(product_floats(max(n, c, v)))
    scale = np.float32(1 / n)
    found: Candidates = {
        "ours": lambda times: loops.repeat_head(times, x, wte, targets, scale, logits, dx, dwte, scratch.ctypes.data),
        "numpy": peers.numpy_head(x, wte, targets),
    }
    if torch:
        found["torch"] = peers.torch_head(torch, x, wte, targets, torch.float32)
    return found


def _layernorm(n: int, c: int, torch: Any) -> tuple[Candidates, Candidates]:
    x, dout, out, dx = aligned(n, c), aligned(n, c, seed=1), filled(n, c), filled(n, c)
    gain, bias, mean, rstd = filled(c, value=1), filled(c), filled(n), filled(n)
    dgain, dbias = filled(c), filled(c)

    def forward(times: int) -> None:
        loops.repeat_layernorm_forward(times, x, gain, bias, out, mean, rstd)

    def backward(times: int) -> None:
        loops.repeat_layernorm_backward(times, dout, x, gain, mean, rstd, dx, dgain, dbias)

    forward(1)
    one, two = peers.numpy_layernorm(x, dout, gain, bias)
    first: Candidates = {"ours": forward, "numpy": one}
    second: Candidates = {"ours": backward, "numpy": two}
    if torch:
        first["torch"], second["torch"] = peers.torch_layernorm(torch, x, dout, gain, bias)
    return first, second


def _gelu(n: int, torch: Any) -> tuple[Candidates, Candidates]:
    x, out = aligned(n), filled(n)
    # Where the slope is exactly 1, repeating it in place leaves numbers as they are.
    steep, dout = np.abs(aligned(n)) + np.float32(20), aligned(n, seed=1)
    one, two = peers.numpy_gelu(x, steep, dout)
    first: Candidates = {"ours": lambda times: loops.repeat_gelu_forward(times, x, out), "numpy": one}
    second: Candidates = {"ours": lambda times: loops.repeat_gelu_backward(times, steep, dout), "numpy": two}
    if torch:
        first["torch"], second["torch"] = peers.torch_gelu(torch, x, steep, dout)
    return first, second


def _softmax(r: int, v: int, torch: Any) -> Candidates:
    logits, scale = aligned(r, v), np.float32(1 / r)
    targets = np.random.default_rng(2).integers(0, v, r).astype(np.int32)
    others = aligned(r, v)
    found: Candidates = {
        "ours": lambda times: loops.repeat_softmax(times, logits, targets, scale),
        "numpy": peers.again(lambda: peers.numpy_softmax_gradient(others, targets)),
    }
    if torch:
        found["torch"] = peers.torch_softmax(torch, others, targets)
    return found


def _gather(size_P: int, torch: Any) -> Candidates:
    segments, out, norms = aligned(SPHERES, size_P), filled(BLOCK), np.zeros(size_P // BLOCK)
    total = filled(size_P)
    at, stride = segments.ctypes.data, segments.strides[0]
    found: Candidates = {
        "ours": keeping(
            lambda times: loops.repeat_gather(
                times, at, stride, SPHERES, out.ctypes.data, norms.ctypes.data, size_P // BLOCK
            ),
            segments,
        ),
        "numpy": peers.again(lambda: np.dot(np.add(segments[0], segments[1], out=total), total)),
    }
    if torch:
        first, second, z = torch.from_numpy(segments[0]), torch.from_numpy(segments[1]), torch.from_numpy(total)
        found["torch"] = peers.again(lambda: torch.linalg.vector_norm(torch.add(first, second, out=z)))
    return found


def _update(size_P: int, torch: Any) -> Candidates:
    params, gradient = aligned(size_P, scale=0.02), aligned(size_P, scale=1e-3, seed=1)
    moments, squares, slot = filled(size_P), filled(size_P), filled(SLOT_FLOATS)
    decision = np.zeros(DECISION_WORDS)
    words = D_FACTOR, D_LR, D_CORRECTION_1, D_CORRECTION_2, D_BETA1, D_BETA2, D_DECAY
    decision[list(words)] = 1, 1e-4, 0.5, 0.5, 0.9, 0.95, 0.1
    places = (params.ctypes.data, moments.ctypes.data, squares.ctypes.data, slot.ctypes.data, size_P // BLOCK)
    found: Candidates = {
        "ours": keeping(
            lambda times: loops.repeat_update(times, decision.ctypes.data, gradient.ctypes.data, *places),
            params,
            moments,
            squares,
            slot,
        ),
        "numpy": peers.numpy_adamw(params, gradient, moments, squares),
    }
    if torch:
        found["torch"] = peers.torch_adamw(torch, params, gradient)
    return found
