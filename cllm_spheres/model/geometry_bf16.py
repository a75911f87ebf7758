"""Layout, block size and dropout -> where everything lies for the bfloat16 kernels.

Sequences are padded to 32 tokens, heads and channels to 32 columns. The packed weights are two forms of every
matrix, pairs and flipped (kernels/bf16/tiles.py), laid out matrix after matrix; they are built in units, each a pure
function of the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cllm_spheres.kernels.bf16.sizes import CHUNK, SWEEP, attention_bytes, kept_logits, padded
from cllm_spheres.kernels.sizes import ALIGN
from cllm_spheres.model.geometry import Geometry
from cllm_spheres.model.layout import LAYER_TENSORS, Layout

# The address of a trace (first, as in geometry.py), scalars, offsets into the parameters, offsets in bytes into a
# layer's part of the arena and into the shared part, the number of packed matrices; then twelve parameter offsets a
# layer; then eight numbers a matrix.
FIELDS = (
    "trace", "vocab_size", "block_size", "layers", "heads", "width", "ff_width", "sequences", "threshold",
    "wte", "wpe", "lnf_gain", "lnf_bias",
    "layer_bytes", "x", "ln1", "qkv", "lse", "att", "mid", "ln2", "up", "act", "stats",
    "x_last", "lnf", "lnf_stats", "dx", "dt", "keys", "row", "wide_bias", "scratch",
    "datt", "rows", "pairs", "columns", "wide",
    "logits", "turned", "kept", "x_pairs", "head_stats", "ids", "targets", "arena_bytes", "matrices",
)  # fmt: skip
(
    TRACE, VOCAB, BLOCK_SIZE, LAYERS, HEADS, WIDTH, FF_WIDTH, SEQUENCES, THRESHOLD,
    WTE, WPE, LNF_GAIN, LNF_BIAS,
    LAYER_BYTES, X, LN1, QKV, LSE, ATT, MID, LN2, UP, ACT, STATS,
    X_LAST, LNF, LNF_STATS, DX, DT, KEYS, ROW, WIDE_BIAS, SCRATCH,
    DATT, ROWS, PAIRS, COLUMNS, WIDE,
    LOGITS, TURNED, KEPT, X_PAIRS, HEAD_STATS, IDS, TARGETS, ARENA_BYTES, MATRICES,
) = range(len(FIELDS))  # fmt: skip
LAYER_OFFSETS = len(FIELDS)
# Of a packed matrix: where its parameters lie (floats), its sizes, the sizes of the groups its rows and columns come
# in (heads; otherwise all of them), where its two forms lie (bytes), and the number of its first unit.
M_PARAMS, M_ROWS, M_COLUMNS, M_ROW_GROUP, M_COLUMN_GROUP, M_PAIRS, M_FLIPPED, M_FIRST_UNIT = range(8)
MATRIX_WORDS = 8
GROUPS_A_UNIT = 16  # groups of 32 columns that a unit has at most: units of about one size

ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class Packed:
    """The packed weights of a model: matrices as the card holds them, bytes and units."""

    matrices: list[tuple[int, ...]]
    size_bytes: int
    units: int


def padded_groups(size: int, group: int) -> int:
    """Size of rows or columns that come in groups, each padded to 32."""
    return size // group * padded(group)


def packed(layout: Layout) -> Packed:
    """Where the packed forms of every matrix lie: those of each layer, then the token embedding."""
    s = layout.shape
    d, c, f = s.width // s.heads, s.width, s.ff_width
    matrices: list[tuple[int, ...]] = []
    end = units = 0
    wanted = [("wte.weight", s.vocab_size, c, s.vocab_size, c)]
    for i in reversed(range(s.layers)):
        wanted = [
            (f"h.{i}.attn.c_attn.weight", c, 3 * c, c, d), (f"h.{i}.attn.c_proj.weight", c, c, d, c),
            (f"h.{i}.mlp.c_fc.weight", c, f, c, f), (f"h.{i}.mlp.c_proj.weight", f, c, f, c), *wanted,
        ]  # fmt: skip
    for name, rows, columns, row_group, column_group in wanted:
        down, across = padded_groups(rows, row_group), padded_groups(columns, column_group)
        size = down * across * 2
        matrices.append((layout.offset_of(name), rows, columns, row_group, column_group, end, end + size, units))
        end += 2 * size
        units += down // 32 * -(-across // (32 * GROUPS_A_UNIT))
    return Packed(matrices, end, units)


def sequences_at_a_time(block_size: int) -> int:
    """How many sequences of a shard are computed together: a function of the shape alone."""
    return max(1, ROWS_AT_A_TIME // padded(block_size))


def geometry(layout: Layout, *, largest_shard: int, dropout: float = 0.0, backward: bool = True) -> Geometry:
    """largest_shard: sequences; no more are ever computed together, which keeps the arena small.

    backward: as in geometry.py.
    """
    s = layout.shape
    c, f, t = padded(s.width), padded(s.ff_width), padded(s.block_size)
    d = s.width // s.heads
    e = padded(d)
    h = s.heads * e
    sequences = min(sequences_at_a_time(s.block_size), largest_shard)
    n = sequences * t
    chunk = min(CHUNK, padded(s.vocab_size))
    values: dict[str, int] = dict(
        trace=0, vocab_size=s.vocab_size, block_size=s.block_size, layers=s.layers, heads=s.heads, width=s.width,
        ff_width=s.ff_width, sequences=sequences, threshold=round(dropout * 2**32),
        wte=layout.offset_of("wte.weight"), wpe=layout.offset_of("wpe.weight"),
        lnf_gain=layout.offset_of("ln_f.weight"), lnf_bias=layout.offset_of("ln_f.bias"),
    )  # fmt: skip

    def place(sizes: dict[str, int], start: int) -> int:
        for name, size in sizes.items():
            values[name] = start
            start += -(-size // (4 * ALIGN)) * 4 * ALIGN
        return start

    one_layer = place(
        dict(x=4 * n * s.width, ln1=2 * n * c, qkv=2 * n * 3 * h, lse=4 * sequences * s.heads * t, att=2 * n * h,
             mid=4 * n * s.width, ln2=2 * n * c, up=2 * n * f, act=2 * n * f, stats=16 * n), 0,
    )  # fmt: skip
    values["layer_bytes"] = one_layer if backward else 0
    widest = max(c, f, 3 * h)
    shared = place(
        dict(x_last=4 * n * s.width, lnf=2 * n * c, lnf_stats=8 * n, keys=8 * sequences, row=4 * widest,
             wide_bias=8 * 3 * h, ids=4 * n, targets=4 * n, head_stats=4 * (5 * n + 2),
             scratch=max(4 * 32 * SWEEP, 4 * 32 * CHUNK, attention_bytes(t, e))),
        s.layers * one_layer if backward else one_layer,
    )  # fmt: skip
    gradients = place(dict(dx=4 * n * s.width, dt=4 * n * s.width), shared)
    # The head is done before the layers' backward begins: their buffers share one place.
    spread = 4 * h * max(3 * h, c) if e != d else 0
    of_layers = place(
        dict(datt=2 * n * h, rows=2 * n * widest, pairs=2 * n * widest, columns=2 * n * max(c, f, h), wide=spread),
        gradients,
    )  # fmt: skip
    kept = kept_logits(n, s.vocab_size)
    of_head = place(dict(logits=2 * n * chunk, turned=2 * n * chunk, kept=4 * kept, x_pairs=2 * n * c), gradients)
    values["kept"] *= kept > 0  # 0: none are kept
    values["arena_bytes"] = max(of_layers, of_head) if backward else shared
    matrices = packed(layout).matrices
    values["matrices"] = len(matrices)
    offsets = [layout.offset_of(f"h.{i}.{name}") for i in range(s.layers) for name in LAYER_TENSORS]
    table = [number for matrix in matrices for number in matrix]
    array = np.array([values[name] for name in FIELDS] + offsets + table, np.int64)
    return Geometry(array, values["arena_bytes"] // 4, sequences)
