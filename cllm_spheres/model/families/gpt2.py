"""GPT-2: layer norms before, causal attention, a tanh GELU, learned positions, a tied output.

Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019). Names and orientation are those of
its own checkpoints, where the weights of linear layers are [in, out].
"""

from __future__ import annotations

import math

from cllm_spheres.model.description import Description, Tensor
from cllm_spheres.model.shape import Shape

DEVIATION = 0.02  # of the first weights


def check(s: Shape) -> None:
    """ValueError where the sizes do not fit each other."""
    if s.width % s.heads:
        raise ValueError(f"{s.heads} heads do not divide a width of {s.width}")


def tensors(s: Shape) -> list[Tensor]:
    """All tensors; the projections into the residual begin smaller, the more layers there are."""
    c, f, residual = s.width, s.ff_width, DEVIATION / math.sqrt(2 * s.layers)
    found: list[Tensor] = []

    def add(name: str, dims: tuple[int, ...], gguf: str, deviation: float = 0.0, **more: bool) -> None:
        if name.endswith(".bias") and not s.bias:
            return
        gain = 1.0 if len(dims) == 1 and name.endswith(".weight") else 0.0
        found.append(
            Tensor(name, dims, f"transformer.{name}", gguf, len(dims) == 2, deviation, gain, **more)
        )  # fmt: skip

    add("wte.weight", (s.vocab_size, c), "token_embd.weight", DEVIATION, transposed=True)
    add("wpe.weight", (s.block_size, c), "position_embd.weight", DEVIATION, looked_up=True)
    for layer in range(s.layers):
        h, blk = f"h.{layer}.", f"blk.{layer}."
        for name, dims, gguf, deviation in (
            ("attn.c_attn", (c, 3 * c), "attn_qkv", DEVIATION),
            ("attn.c_proj", (c, c), "attn_output", residual),
            ("mlp.c_fc", (c, f), "ffn_up", DEVIATION),
            ("mlp.c_proj", (f, c), "ffn_down", residual),
        ):
            add(f"{h}{name}.weight", dims, f"{blk}{gguf}.weight", deviation)
        for name, gguf in (("ln_1", "attn_norm"), ("ln_2", "ffn_norm")):
            add(f"{h}{name}.weight", (c,), f"{blk}{gguf}.weight")
            add(f"{h}{name}.bias", (c,), f"{blk}{gguf}.bias")
        for name, size, gguf in (
            ("attn.c_attn", 3 * c, "attn_qkv"),
            ("attn.c_proj", c, "attn_output"),
            ("mlp.c_fc", f, "ffn_up"),
            ("mlp.c_proj", c, "ffn_down"),
        ):
            add(f"{h}{name}.bias", (size,), f"{blk}{gguf}.bias")
    add("ln_f.weight", (c,), "output_norm.weight")
    add("ln_f.bias", (c,), "output_norm.bias")
    return found


def describe(s: Shape, d: Description) -> None:
    """The forward pass."""
    head_width = s.width // s.heads
    x = d.embed("wte.weight", "wpe.weight", s.width, site=0)
    for layer in range(s.layers):
        with d.block(layer) as h:
            normed = d.norm(x, f"{h}ln_1")
            qkv = d.linear(normed, f"{h}attn.c_attn", 3 * s.width, group=head_width, label="qkv")
            attended = d.attention(qkv, s.heads, site=3 * layer + 1)
            x = d.linear(
                attended, f"{h}attn.c_proj", s.width, residual=x, site=3 * layer + 2, label="attention projection"
            )  # fmt: skip
            normed = d.norm(x, f"{h}ln_2")
            up = d.linear(normed, f"{h}mlp.c_fc", s.ff_width, activation="gelu", label="feed-forward up")
            x = d.linear(up, f"{h}mlp.c_proj", s.width, residual=x, site=3 * layer + 3, label="feed-forward down")
    d.head(d.norm(x, "ln_f"), "wte.weight")
