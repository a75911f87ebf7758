"""Compiled kernels -> findings: do they compute what the formulas in numpy's float64 say?

Each step of a family's description has its formula here, slow and plain. The gradient is compared with finite
differences of that loss, tensor by tensor, so that no backward pass is needed.

B sequences, T positions, C channels, H heads of width D, V vocabulary, P parameters.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from cllm_spheres.doctor.finding import Answer
from cllm_spheres.kernels.sizes import BLOCK, SLOT_FLOATS
from cllm_spheres.model.description import Attention, Embed, Head, Linear, Norm, Stream
from cllm_spheres.model.families import described
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.shape import Shape
from cllm_spheres.model.workspace import Workspace

Array = npt.NDArray[np.float64]
SHAPE = Shape(vocab_size=50, block_size=20, layers=2, heads=4, width=64, ff_width=96)
SEQUENCES = 3
# Relative to the loss, and to the gradient's part along a random direction. Measured on AVX-512: 1e-8 and
# 1e-6 in float32, 1.3e-4 and 0.016 in bfloat16, which keeps 0.4 % of each operand. A wrong term is off by about 1.
LOSS_WITHIN = {"fp32": 1e-5, "bf16": 2e-3}
GRADIENT_WITHIN = {"fp32": 1e-3, "bf16": 0.15}
WRONG = "The kernels compute wrongly on this CPU: delete the kernel cache and try again; if it stays, report it."


def loss(shape: Shape, p: dict[str, Array], inputs_BT: np.ndarray, targets_BT: np.ndarray) -> float:
    """The summed token loss without dropout, in float64: the formula of each step that the family describes."""
    found: dict[Stream, Array] = {}
    for step in described(shape).steps:
        if isinstance(step, Embed):
            found[step.out] = p[step.tokens][inputs_BT] + p[step.positions][: inputs_BT.shape[1]]
        elif isinstance(step, Norm):
            centred = found[step.x] - found[step.x].mean(-1, keepdims=True)
            normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
            found[step.out] = normed * p[step.gain] + p.get(step.bias, 0.0)
        elif isinstance(step, Linear):
            y = found[step.x] @ p[step.weight] + p.get(step.bias, 0.0)
            if step.activation:
                y = ACTIVATIONS[step.activation](y)
            found[step.out] = y if step.residual is None else found[step.residual] + y
        elif isinstance(step, Attention):
            found[step.out] = _attended(found[step.qkv], step.heads)
        else:
            assert isinstance(step, Head), f"no formula for {step}"
            logits = found[step.x] @ p[step.weight].T
    largest = logits.max(-1)
    log_sum = largest + np.log(np.exp(logits - largest[..., None]).sum(-1))
    return float((log_sum - np.take_along_axis(logits, targets_BT[..., None], -1)[..., 0]).sum())


def _gelu(x: Array) -> Array:
    y: Array = x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return y


ACTIVATIONS = {"gelu": _gelu}


def _attended(qkv_BTC3: Array, heads: int) -> Array:
    """Causal attention of queries, keys and values side by side -> [B, T, C]."""
    b, t, _ = qkv_BTC3.shape
    q, k, v = qkv_BTC3.reshape(b, t, 3, heads, -1).transpose(2, 0, 3, 1, 4)  # each [B, H, T, D]
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones((t, t), bool)), scores, -np.inf)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    out: Array = (e / e.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(b, t, -1)
    return out


def look_at_model(dtype: str, family: str = "gpt2") -> Answer:
    """Loss and gradient of a small model by the compiled kernels of a dtype, against the formulas."""
    shape = replace(SHAPE, family=family)
    rng, layout = np.random.default_rng(3), Layout(shape)
    params_P = np.zeros(layout.size, np.float32)
    for placed, view in zip(layout.tensors, layout.views(params_P).values(), strict=True):
        view[...] = rng.standard_normal(view.shape) * 0.1 + placed.tensor.constant
    ids = rng.integers(0, SHAPE.vocab_size, (2, SEQUENCES, SHAPE.block_size)).astype(np.int32)
    tokens = SEQUENCES * SHAPE.block_size
    found_loss, segment_P = compute(dtype, layout, params_P, ids[0], ids[1], 1 / tokens)

    exact = {name: view.astype(np.float64) for name, view in layout.views(params_P).items()}
    expected_loss = loss(shape, exact, ids[0], ids[1])
    off_loss = abs(found_loss - expected_loss) / expected_loss
    gradients = layout.views(segment_P)
    for name, gradient in gradients.items():
        if not np.isfinite(gradient).all():
            return "bad", f"the gradient of {name} is not finite", WRONG
    largest = max(float(np.linalg.norm(gradient)) for gradient in gradients.values())
    worst, where = 0.0, ""
    for name, gradient in gradients.items():
        direction = rng.choice([-1.0, 1.0], gradient.shape) / math.sqrt(gradient.size)  # of length 1
        step = 1e-4
        ends = [
            loss(shape, exact | {name: exact[name] + sign * step * direction}, ids[0], ids[1]) / tokens
            for sign in (1, -1)
        ]
        expected, actual = (ends[0] - ends[1]) / (2 * step), float((gradient * direction).sum())
        # What a gradient of this length has along a random direction; rounding leaves some where it is zero.
        scale = max(float(np.linalg.norm(gradient)), 1e-2 * largest) / math.sqrt(gradient.size)
        off = abs(actual - expected) / scale
        if off > worst:
            worst, where = off, name
    found = f"loss off by {off_loss:.1e}, gradient by at most {worst:.1e} ({where})"
    within = off_loss <= LOSS_WITHIN[dtype] and worst <= GRADIENT_WITHIN[dtype]
    allowed = f"{LOSS_WITHIN[dtype]:g} and {GRADIENT_WITHIN[dtype]:g} are allowed"
    return ("ok", f"{found}; {allowed}") if within else ("bad", f"{found}; {allowed}", WRONG)


def compute(
    dtype: str, layout: Layout, params_P: np.ndarray, inputs_BT: np.ndarray, targets_BT: np.ndarray, scale: float
) -> tuple[float, np.ndarray]:
    """The summed loss and the gradient segment by the compiled kernels; buffers begin as NaN."""
    segment_P, workspace = np.zeros(layout.size, np.float32), Workspace(layout, params_P, dtype)
    for buffer in (workspace.packed, workspace.arena, *layout.views(segment_P).values()):
        buffer[...] = np.nan
    workspace.pack()
    return workspace.shard(inputs_BT, targets_BT, segment_P, scale)[0], segment_P


def look_at_optimizer() -> Answer:
    """One block gathered from five segments, to the bit, and one update by AdamW."""
    from cllm_spheres.kernels import optimizer as O
    from cllm_spheres.kernels.gather import gather_block

    rng, segments = np.random.default_rng(4), 5
    segment_SP = rng.standard_normal((segments, BLOCK)).astype(np.float32)
    sum_P, norms = np.full(BLOCK, np.nan, np.float32), np.full(1, np.nan)
    at = gather_block.call(
        segment_SP.ctypes.data, segment_SP.strides[0], segments, sum_P.ctypes.data, norms.ctypes.data, 0
    )
    expected = segment_SP[0].copy()
    for s in range(1, segments):
        expected += segment_SP[s]
    same = at == sum_P.ctypes.data and bool((sum_P == expected).all())
    off_norm = abs(norms[0] / (expected.astype(np.float64) ** 2).sum() - 1)

    p, m = (rng.standard_normal(BLOCK).astype(np.float32) for _ in range(2))
    v, slot = (m * m).copy(), np.full(SLOT_FLOATS, np.nan, np.float32)
    decision = np.zeros(O.DECISION_WORDS)
    lr, beta1, beta2, decay, t = 1e-2, 0.9, 0.99, 0.1, 3
    for word, value in ((O.D_FACTOR, 0.5), (O.D_LR, lr), (O.D_BETA1, beta1), (O.D_BETA2, beta2), (O.D_DECAY, decay),
                        (O.D_CORRECTION_1, 1 - beta1**t), (O.D_CORRECTION_2, 1 - beta2**t)):  # fmt: skip
        decision[word] = value
    g = 0.5 * expected.astype(np.float64)
    new_m, new_v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    step = new_m / (1 - beta1**t) / (np.sqrt(new_v / (1 - beta2**t)) + O.EPSILON)
    wanted = np.concatenate([p * (1 - lr * decay) - lr * step, new_m, new_v])
    places = [buffer.ctypes.data for buffer in (p, m, v, slot)]
    O.update_block.call(O.ADAMW, decision.ctypes.data, expected.ctypes.data, *places, 0, 1)
    O.commit_block.call(O.ADAMW, *places, 0)
    off = float(np.abs(np.concatenate([p, m, v]) - wanted).max() / np.abs(wanted).max())
    found = f"sum of {segments} segments {'the same bits' if same else 'other bits'},"
    found += f" norm off by {off_norm:.1e}, AdamW by {off:.1e}"
    return ("ok", found) if same and off_norm <= 1e-12 and off <= 1e-6 else ("bad", found, WRONG)
