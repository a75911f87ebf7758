"""Arrays -> the kernels of the others: numpy as one would write it, and PyTorch's own, each a function of `times`.

Called from Python, as their users call them: the call is part of their time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Way = Callable[[int], object]
_ROOT = math.sqrt(2 / math.pi)


def again(call: Callable[[], object]) -> Way:
    """A call -> a function that makes it `times` times."""

    def way(times: int) -> None:
        for _ in range(times):
            call()

    return way


def numpy_layernorm(x: np.ndarray, dout: np.ndarray, gain: np.ndarray, bias: np.ndarray) -> tuple[Way, Way]:
    """Forward and backward."""

    def normed() -> tuple[np.ndarray, np.ndarray]:
        centred = x - x.mean(-1, keepdims=True)
        rstd = 1 / np.sqrt((centred * centred).mean(-1, keepdims=True) + np.float32(1e-5))
        return centred * rstd, rstd

    kept, rstd = normed()
    dx = np.zeros_like(x)

    def backward() -> None:
        g = dout * gain
        np.add(dx, rstd * (g - g.mean(-1, keepdims=True) - kept * (g * kept).mean(-1, keepdims=True)), out=dx)
        (dout * kept).sum(0), dout.sum(0)

    return again(lambda: normed()[0] * gain + bias), again(backward)


def torch_layernorm(torch: Any, *arrays: np.ndarray) -> tuple[Way, Way]:
    """Forward and backward."""
    x, dout, gain, bias = (torch.from_numpy(a) for a in arrays)
    shape, native = [x.shape[1]], torch.ops.aten.native_layer_norm_backward
    _, mean, rstd = torch.native_layer_norm(x, shape, gain, bias, 1e-5)
    dx = torch.zeros_like(x)
    return (
        again(lambda: torch.nn.functional.layer_norm(x, shape, gain, bias)),
        again(lambda: dx.add_(native(dout, x, shape, mean, rstd, gain, bias, [True, True, True])[0])),
    )


def numpy_gelu(x: np.ndarray, steep: np.ndarray, dout: np.ndarray) -> tuple[Way, Way]:
    """Forward at x, backward at `steep`."""

    def tanh_of(y: np.ndarray) -> np.ndarray:
        return np.tanh(np.float32(_ROOT) * (y + np.float32(0.044715) * y * y * y))

    def slope(y: np.ndarray) -> np.ndarray:
        t = tanh_of(y)
        inner = np.float32(_ROOT) * (1 + np.float32(3 * 0.044715) * y * y)
        return np.float32(0.5) * (1 + t + y * (1 - t * t) * inner)

    return again(lambda: np.float32(0.5) * x * (1 + tanh_of(x))), again(lambda: dout * slope(steep))


def torch_gelu(torch: Any, *arrays: np.ndarray) -> tuple[Way, Way]:
    """Forward at x, backward at `steep`."""
    x, steep, dout = (torch.from_numpy(a) for a in arrays)
    backward = torch.ops.aten.gelu_backward
    return (
        again(lambda: torch.nn.functional.gelu(x, approximate="tanh")),
        again(lambda: backward(dout, steep, approximate="tanh")),
    )


def numpy_softmax_gradient(logits_RV: np.ndarray, targets_R: np.ndarray) -> np.ndarray:
    """The gradient of the mean cross-entropy; its loss is computed and dropped."""
    rows = np.arange(len(targets_R))
    e = np.exp(logits_RV - logits_RV.max(-1, keepdims=True))
    total = e.sum(-1, keepdims=True)
    e /= total * np.float32(len(targets_R))
    np.log(total).sum()
    e[rows, targets_R] -= np.float32(1 / len(targets_R))
    return e


def torch_softmax(torch: Any, logits_RV: np.ndarray, targets_R: np.ndarray) -> Way:
    """Loss and gradient through autograd."""
    logits, targets = torch.from_numpy(logits_RV).requires_grad_(), torch.from_numpy(targets_R).long()
    return again(lambda: torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets), logits))


def numpy_head(x: np.ndarray, wte: np.ndarray, targets: np.ndarray) -> Way:
    """Logits, loss and both gradients."""

    def whole() -> None:
        dlogits = numpy_softmax_gradient(x @ wte.T, targets)
        dlogits @ wte, dlogits.T @ x

    return again(whole)


def torch_head(torch: Any, x: np.ndarray, wte: np.ndarray, targets: np.ndarray, kind: Any) -> Way:
    """Logits, loss in float32 and both gradients through autograd, the products in `kind`."""
    a, w = (torch.from_numpy(array).to(kind).requires_grad_() for array in (x, wte))
    wanted = torch.from_numpy(targets).long()

    def whole() -> None:
        loss = torch.nn.functional.cross_entropy((a @ w.T).float(), wanted)
        torch.autograd.grad(loss, (a, w))

    return again(whole)


def numpy_attention(qkv: np.ndarray, dout: np.ndarray, sequences: int, heads: int) -> tuple[Way, Way]:
    """Causal attention with whole matrices of scores: forward, and backward from the kept probabilities."""
    c = dout.shape[1]
    t, d = len(qkv) // sequences, c // heads
    q, k, v = (np.ascontiguousarray(a) for a in qkv.reshape(sequences, t, 3, heads, d).transpose(2, 0, 3, 1, 4))
    do = np.ascontiguousarray(dout.reshape(sequences, t, heads, d).transpose(0, 2, 1, 3))
    mask = np.triu(np.full((t, t), -np.inf, np.float32), 1)
    scale = np.float32(1 / math.sqrt(d))

    def probabilities() -> np.ndarray:
        s = q @ k.swapaxes(-1, -2) * scale + mask
        e = np.exp(s - s.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    p = probabilities()

    def backward() -> None:
        dp = do @ v.swapaxes(-1, -2)
        ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
        ds @ k, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ do

    return again(lambda: probabilities() @ v), again(backward)


def torch_attention(
    torch: Any, qkv: np.ndarray, dout: np.ndarray, sequences: int, heads: int, kind: Any
) -> dict[str, tuple[Way, Way]]:
    """Forward and backward, by scaled_dot_product_attention and by matrix products."""
    c = dout.shape[1]
    t, d = len(qkv) // sequences, c // heads
    parts = torch.from_numpy(qkv).to(kind).view(sequences, t, 3 * c).split(c, 2)
    q, k, v = (a.view(sequences, t, heads, d).transpose(1, 2) for a in parts)
    do = torch.from_numpy(dout).to(kind).view(sequences, t, heads, d).transpose(1, 2)
    hidden = torch.ones(t, t, dtype=torch.bool).triu(1)

    def sdpa(q: Any, k: Any, v: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def matmul(q: Any, k: Any, v: Any) -> Any:
        scores = (q @ k.transpose(-2, -1)) * (1 / math.sqrt(d))
        return torch.softmax(scores.masked_fill(hidden, float("-inf")), -1) @ v

    def pair(attend: Callable[[Any, Any, Any], Any]) -> tuple[Way, Way]:
        leaves = [a.detach().requires_grad_() for a in (q, k, v)]
        out = attend(*leaves)
        return (
            again(lambda: attend(q, k, v)),
            again(lambda: torch.autograd.grad(out, leaves, do, retain_graph=True)),
        )

    return {"torch": pair(sdpa), "torch matmul": pair(matmul)}


def numpy_adamw(p: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray) -> Way:
    """A step on arrays of its own, in place, with two temporary arrays."""
    p, m, v = p.copy(), m.copy(), v.copy()
    one, two = np.empty_like(p), np.empty_like(p)
    f4 = np.float32

    def step() -> None:
        np.multiply(m, f4(0.9), out=m)
        np.add(m, np.multiply(g, f4(0.1), out=one), out=m)
        np.multiply(v, f4(0.95), out=v)
        np.add(v, np.multiply(np.multiply(g, g, out=one), f4(0.05), out=one), out=v)
        np.sqrt(np.multiply(v, f4(2), out=one), out=one)
        np.add(one, f4(1e-8), out=one)
        np.divide(np.multiply(m, f4(2e-4), out=two), one, out=two)
        np.multiply(p, f4(1 - 1e-5), out=p)
        np.subtract(p, two, out=p)

    return again(step)


def torch_adamw(torch: Any, p: np.ndarray, g: np.ndarray) -> Way:
    """AdamW(fused=True) on one tensor."""
    parameter = torch.nn.Parameter(torch.from_numpy(p.copy()))
    parameter.grad = torch.from_numpy(g)
    optimizer = torch.optim.AdamW([parameter], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return again(optimizer.step)
