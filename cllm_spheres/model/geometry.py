"""Layout, block size and dropout -> one array of int64 that tells the kernels where everything lies.

The activations live in one arena of float32, sized once: a part for each layer, which the backward reads again,
and a part that all layers share. Offsets are in floats.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cllm_spheres.kernels.sizes import ALIGN, attention_floats, product_floats
from cllm_spheres.model.layout import LAYER_TENSORS, Layout

# The address of a trace (kernels/trace.py; 0: none is kept), scalars, offsets into the parameters, into a layer's part
# of the arena and into the shared part; then twelve parameter offsets a layer.
FIELDS = (
    "trace", "vocab_size", "block_size", "layers", "heads", "width", "ff_width", "sequences", "head_rows", "threshold",
    "wte", "wpe", "lnf_gain", "lnf_bias",
    "layer_floats", "x", "ln1", "qkv", "lse", "att", "mid", "ln2", "up", "act", "stats",
    "x_last", "lnf", "lnf_stats", "logits", "dx", "dt", "datt", "dqkv", "dact", "scratch", "products", "arena_floats",
)  # fmt: skip
(
    TRACE, VOCAB, BLOCK_SIZE, LAYERS, HEADS, WIDTH, FF_WIDTH, SEQUENCES, HEAD_ROWS, THRESHOLD,
    WTE, WPE, LNF_GAIN, LNF_BIAS,
    LAYER_FLOATS, X, LN1, QKV, LSE, ATT, MID, LN2, UP, ACT, STATS,
    X_LAST, LNF, LNF_STATS, LOGITS, DX, DT, DATT, DQKV, DACT, SCRATCH, PRODUCTS, ARENA_FLOATS,
) = range(len(FIELDS))  # fmt: skip
LAYER_OFFSETS = len(FIELDS)

# Tokens computed together: below this width 256 are as fast as more and keep the arena in cache; from it on packing the
# weights for more rows at once pays (width 384: 5 %).
WIDE = 384
ROWS_AT_A_TIME, ROWS_WHERE_WIDE = 256, 512
LOGITS_FLOATS = 1 << 24  # of one chunk of the head, at most: 64 MB


@dataclass(frozen=True)
class Geometry:
    """`array` is what the kernels take, `arena_floats` the size of the workspace they need."""

    array: np.ndarray
    arena_floats: int
    sequences: int  # computed together


def sequences_at_a_time(block_size: int, width: int) -> int:
    """How many sequences of a shard are computed together: a function of the shape alone."""
    return max(1, (ROWS_AT_A_TIME if width < WIDE else ROWS_WHERE_WIDE) // block_size)


def head_rows(rows: int, vocab_size: int) -> int:
    """Rows whose logits exist at once: chunks of nearly equal size, as few as `LOGITS_FLOATS` allows."""
    most = max(16, LOGITS_FLOATS // vocab_size)
    return -(-rows // -(-rows // most))


def geometry(layout: Layout, *, largest_shard: int, dropout: float = 0.0, backward: bool = True) -> Geometry:
    """largest_shard: sequences; no more are ever computed together, which keeps the arena small.

    backward: what the forward leaves is read again; else all layers share one place, and only losses can be computed.
    """
    s = layout.shape
    c, f, v = s.width, s.ff_width, s.vocab_size
    sequences = min(sequences_at_a_time(s.block_size, c), largest_shard)
    n = sequences * s.block_size
    rows_of_head = head_rows(n, v)
    values: dict[str, int] = dict(
        trace=0, vocab_size=v, block_size=s.block_size, layers=s.layers, heads=s.heads, width=c, ff_width=f,
        sequences=sequences, head_rows=rows_of_head, threshold=round(dropout * 2**32),
        wte=layout.offset_of("wte.weight"), wpe=layout.offset_of("wpe.weight"),
        lnf_gain=layout.offset_of("ln_f.weight"), lnf_bias=layout.offset_of("ln_f.bias"),
    )  # fmt: skip

    def place(sizes: dict[str, int], start: int) -> int:
        for name, size in sizes.items():
            values[name] = start
            start += -(-size // ALIGN) * ALIGN
        return start

    one_layer = place(
        dict(x=n * c, ln1=n * c, qkv=n * 3 * c, lse=sequences * s.heads * s.block_size, att=n * c,
             mid=n * c, ln2=n * c, up=n * f, act=n * f, stats=4 * n), 0,
    )  # fmt: skip
    values["layer_floats"] = one_layer if backward else 0
    shared = place(
        dict(x_last=n * c, lnf=n * c, lnf_stats=2 * n, logits=rows_of_head * v, scratch=attention_floats(s.block_size),
             products=product_floats(max(n, c, f, v))), s.layers * one_layer if backward else one_layer,
    )  # fmt: skip
    gradients = place(dict(dx=n * c, dt=n * c, datt=n * c, dqkv=n * 3 * c, dact=n * f), shared)
    values["arena_floats"] = gradients if backward else shared
    offsets = [layout.offset_of(f"h.{i}.{name}") for i in range(s.layers) for name in LAYER_TENSORS]
    array = np.array([values[name] for name in FIELDS] + offsets, np.int64)
    return Geometry(array, values["arena_floats"], sequences)


def new_arena(floats: int) -> np.ndarray:
    """An arena aligned to a cache line; its pages are taken as they are first written."""
    buffer = np.empty(floats + ALIGN, np.float32)
    start = -(buffer.ctypes.data // 4) % ALIGN
    return buffer[start : start + floats]
