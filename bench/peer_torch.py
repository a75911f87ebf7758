"""An order (JSON file) -> the same model trained by PyTorch, until it is ended; a line of JSON for each step.

    python -m cllm_spheres_bench.peer_torch ORDER.json

The process imports none of our kernels: weights come as safetensors, the corpus and the windows' starts as .npy.
It trains as one would in PyTorch itself: fused AdamW, foreach clipping, gradients set to None.
"""

# B sequences, T positions, C channels, H heads of width D, F feed-forward, V vocabulary

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EPSILON_NORM, EPSILON_ADAM = 1e-5, 1e-8
LINES_EVERY_S = 0.1  # as our own metrics

MODES = ("eager", "compile", "max-autotune")
ATTENTIONS = ("sdpa", "matmul")
GELUS = ("tanh", "erf")


@dataclass(frozen=True)
class Variant:
    """A way to train in PyTorch."""

    dtype: str  # fp32, or bf16: autocast
    mode: str
    attention: str  # sdpa: scaled_dot_product_attention; matmul: two products and a softmax
    gelu: str
    threads: int

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        return f"{self.mode}, {self.attention}, {self.gelu} GELU, {threads}"


@dataclass(frozen=True)
class Order:
    """What the process trains, and where it finds and leaves things. `starts` is int64 [steps, B]."""

    variant: dict[str, Any]
    vocab_size: int
    block_size: int
    layers: int
    heads: int
    width: int
    ff_width: int
    bias: bool
    lr: float
    min_lr: float
    warmup: int
    steps: int
    beta1: float
    beta2: float
    weight_decay: float
    clip: float
    weights: str
    corpus: str
    starts: str
    metrics: str
    parent: int

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))


def learning_rate(step: int, order: Order) -> float:
    """Linear warm-up, then a cosine to min_lr, as nanoGPT writes it; steps count from 1."""
    if step <= order.warmup:
        return order.lr * step / order.warmup
    share = (step - order.warmup) / (order.steps - order.warmup)
    return order.min_lr + 0.5 * (1 + math.cos(math.pi * share)) * (order.lr - order.min_lr)


def build_model(shape: Any, attention: str = "sdpa", gelu: str = "tanh") -> Any:
    """GPT-2 as a module whose parameters have the names of its checkpoints; it returns the mean loss.

    shape: an Order, or whatever else has the sizes of a model under the same names.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    C, H, V = shape.width, shape.heads, shape.vocab_size
    approximate = {"tanh": "tanh", "erf": "none"}[gelu]

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = nn.Linear(C, 3 * C, bias=shape.bias)
            self.c_proj = nn.Linear(C, C, bias=shape.bias)
            if attention == "matmul":
                ones_TT = torch.ones(shape.block_size, shape.block_size, dtype=torch.bool)
                self.register_buffer("future_TT", ones_TT.triu(1))

        def forward(self, x_BTC: Any) -> Any:
            B, T, _ = x_BTC.shape
            q, k, v = (y.view(B, T, H, C // H).transpose(1, 2) for y in self.c_attn(x_BTC).split(C, 2))
            if attention == "sdpa":
                y_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                scores_BHTT = (q @ k.transpose(2, 3)) * (C // H) ** -0.5
                y_BHTD = F.softmax(scores_BHTT.masked_fill(self.future_TT[:T, :T], -math.inf), 3) @ v
            return self.c_proj(y_BHTD.transpose(1, 2).reshape(B, T, C))

    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_fc = nn.Linear(C, shape.ff_width, bias=shape.bias)
            self.c_proj = nn.Linear(shape.ff_width, C, bias=shape.bias)

        def forward(self, x_BTC: Any) -> Any:
            return self.c_proj(F.gelu(self.c_fc(x_BTC), approximate=approximate))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = (nn.LayerNorm(C, EPSILON_NORM, bias=shape.bias) for _ in range(2))
            self.attn, self.mlp = Attention(), MLP()

        def forward(self, x_BTC: Any) -> Any:
            x_BTC = x_BTC + self.attn(self.ln_1(x_BTC))
            return x_BTC + self.mlp(self.ln_2(x_BTC))

    class GPT2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(shape.block_size, C)
            self.h = nn.ModuleList(Block() for _ in range(shape.layers))
            self.ln_f = nn.LayerNorm(C, EPSILON_NORM, bias=shape.bias)

        def hidden(self, inputs_BT: Any) -> Any:
            x_BTC = self.wte(inputs_BT) + self.wpe.weight[: inputs_BT.shape[1]]
            for block in self.h:
                x_BTC = block(x_BTC)
            return x_BTC

        def logits(self, inputs_BT: Any) -> Any:
            return F.linear(self.ln_f(self.hidden(inputs_BT)), self.wte.weight)

        def forward(self, inputs_BT: Any, targets_BT: Any) -> Any:
            return F.cross_entropy(self.logits(inputs_BT).flatten(0, 1), targets_BT.flatten())

        def next_logits(self, inputs_BT: Any) -> Any:
            return F.linear(self.ln_f(self.hidden(inputs_BT)[:, -1]), self.wte.weight)

    return GPT2()


def turned(name: str, tensor: Any) -> Any:
    """A parameter as we lay it out from PyTorch's, or back: linear weights are [in, out] here and [out, in] there."""
    return tensor.T if tensor.ndim == 2 and name not in ("wte.weight", "wpe.weight") else tensor


def set_weights(model: Any, tensors: dict[str, Any]) -> None:
    """Fill every parameter from our tensors."""
    import torch

    parameters = dict(model.named_parameters())
    assert set(tensors) == set(parameters), set(tensors) ^ set(parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(turned(name, tensors[name]))


class Lines:
    """Appends records to a file about ten times a second."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "a", buffering=1 << 20, encoding="utf-8")  # noqa: SIM115  as long as the process
        self._flushed = 0.0

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        now = time.monotonic()
        if now - self._flushed >= LINES_EVERY_S:
            self._file.flush()
            self._flushed = now


def train(order: Order) -> None:
    """Train until the windows are used up, which is an error; the process is ended before."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    variant = Variant(**order.variant)
    torch.set_num_threads(variant.threads)
    torch.set_flush_denormal(True)
    model = build_model(order, variant.attention, variant.gelu)
    set_weights(model, load_file(order.weights))
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": order.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(order.beta1, order.beta2), eps=EPSILON_ADAM, fused=True)
    forward = model
    if variant.mode != "eager":
        forward = torch.compile(model, mode=None if variant.mode == "compile" else variant.mode)
    corpus = np.load(order.corpus, mmap_mode="r")
    starts = np.load(order.starts, mmap_mode="r")
    window = np.arange(order.block_size + 1)
    lines = Lines(order.metrics)
    autocast = torch.autocast("cpu", torch.bfloat16) if variant.dtype == "bf16" else contextlib.nullcontext()
    for step, starts_B in enumerate(starts, 1):
        ids_BT1 = torch.from_numpy(corpus[starts_B[:, None] + window].astype(np.int64))
        rate = learning_rate(step, order)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = forward(ids_BT1[:, :-1].contiguous(), ids_BT1[:, 1:].contiguous())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, order.clip, foreach=True)
        optimizer.step()
        lines.write({
            "kind": "step", "step": step, "loss": loss.item(), "lr": rate, "grad_norm": norm.item(),
            "time": time.time(),
        })  # fmt: skip
    raise RuntimeError(f"The {len(starts):,} batches that were handed over are used up.")


def main() -> None:
    """Obey the order, and end with whoever gave it."""
    from cllm_spheres_bench.children import end_with

    order = Order(**json.loads(Path(sys.argv[1]).read_text()))
    end_with(order.parent)
    train(order)


if __name__ == "__main__":
    main()
