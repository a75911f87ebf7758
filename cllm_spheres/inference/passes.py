"""Rows of tokens, each at a position of a text -> keys and values into the cache, and the logits that are wanted.

A pass takes any number of rows: those of a prompt, the next token of many texts, or both. Every row is computed as if
it were alone, so that a text does not depend on what it is computed with. The members of a team share the columns of
the products and the heads of the texts among them, and meet between two phases.

M rows, C channels, F channels of the feed-forward, H heads of D = C / H channels, T positions of a text, V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numba import types

from cllm_spheres.crystal.jit import entry, kernel
from cllm_spheres.inference.team import begin, meet, next_pass, stop
from cllm_spheres.kernels.arrays import (
    copy_floats,
    exp_of_difference,
    f4,
    floats,
    integers,
    matrix,
    row_max,
    scale_row,
    tokens,
)
from cllm_spheres.kernels.fpu import flush_subnormals, restore
from cllm_spheres.kernels.gelu import gelu_forward
from cllm_spheres.kernels.layernorm import layernorm_forward
from cllm_spheres.kernels.sizes import ALIGN, TILE_COLUMNS
from cllm_spheres.kernels.strips import (
    bundle_at,
    bundle_rows,
    first_row,
    multiply_strips,
    num_bundles,
    num_strips,
)
from cllm_spheres.kernels.tiles import tile
from cllm_spheres.model.layout import (
    B_ATT,
    B_DOWN,
    B_LN1,
    B_LN2,
    B_QKV,
    B_UP,
    G_LN1,
    G_LN2,
    LAYER_TENSORS,
    W_ATT,
    W_DOWN,
    W_QKV,
    W_UP,
    Layout,
)
from cllm_spheres.model.views import vector

_i8 = types.int64
_multiply = multiply_strips.external

# A pass as int64: sizes; addresses of weights (params: float32 as in training; strips: packed), of the cache and of
# buffers, the offsets of tensors in them; what is to be done. Then a layer's offsets: into params in floats, into
# strips in bytes.
FIELDS = (
    "vocab_size", "block_size", "layers", "heads", "width", "ff_width", "halves", "members",
    "params", "strips", "cache", "team", "x", "mid", "normed", "qkv", "up", "narrow", "wide", "scores", "stats",
    "logits", "slot_floats", "key_floats", "score_floats", "wte", "wpe", "lnf_gain", "lnf_bias", "head",
    "rows", "ids", "pieces", "num_pieces", "wanted", "num_wanted",
)  # fmt: skip
(
    VOCAB, BLOCK_SIZE, LAYERS, HEADS, WIDTH, FF_WIDTH, HALVES, MEMBERS,
    PARAMS, STRIPS, CACHE, TEAM, X, MID, NORMED, QKV, UP, NARROW, WIDE, SCORES, STATS, LOGITS,
    SLOT_FLOATS, KEY_FLOATS, SCORE_FLOATS, WTE, WPE, LNF_GAIN, LNF_BIAS, HEAD,
    ROWS, IDS, PIECES, NUM_PIECES, WANTED, NUM_WANTED,
) = range(len(FIELDS))  # fmt: skip
LAYER_OFFSETS = len(FIELDS)
PIECE_WORDS = 4  # of a piece: slot, first row, rows, position of the first row
P_SLOT, P_ROW, P_ROWS, P_POSITION = range(PIECE_WORDS)
_PER_LAYER = len(LAYER_TENSORS)


def key_floats(block_size: int, head_width: int) -> int:
    """Floats of a head's keys: a column a position, rows padded to whole vectors."""
    return head_width * (-(-block_size // TILE_COLUMNS) * TILE_COLUMNS)


def slot_floats(layout: Layout) -> int:
    """Floats of the keys and values of one text."""
    s = layout.shape
    d = s.width // s.heads
    values = -(-s.block_size * d // ALIGN) * ALIGN + TILE_COLUMNS  # a tile reads whole vectors of the last row too
    return s.layers * s.heads * (key_floats(s.block_size, d) + values)


@kernel
def _share(n, members, member):
    """The part [first, last) of n things that belongs to a member."""
    return member * n // members, (member + 1) * n // members


@kernel
def _card(address):
    layers = integers(address, LAYERS + 1)[LAYERS]
    return integers(address, LAYER_OFFSETS + layers * _PER_LAYER)


@kernel
def _embed(card, member, rows):
    """This member's rows of x: the embeddings of their tokens and of their positions."""
    c, ids = card[WIDTH], tokens(card[IDS], rows)
    first, last = _share(rows, card[MEMBERS], member)
    for i in range(card[NUM_PIECES]):
        piece = integers(card[PIECES] + 8 * PIECE_WORDS * i, PIECE_WORDS)
        start = piece[P_ROW]
        for row in range(max(first, start), min(last, start + piece[P_ROWS])):
            position = piece[P_POSITION] + row - start
            token = floats(card[PARAMS] + 4 * (card[WTE] + np.int64(ids[row]) * c), c)
            place = floats(card[PARAMS] + 4 * (card[WPE] + position * c), c)
            out = floats(card[X] + 4 * row * c, c)
            for j in range(c):
                out[j] = token[j] + place[j]


@kernel
def _norm(card, member, source, gain, bias, rows):
    """This member's bundles of the normed rows at the address `source`."""
    c = card[WIDTH]
    first, last = _share(num_bundles(rows), card[MEMBERS], member)
    for bundle in range(first, last):
        row = first_row(rows, bundle)
        count = first_row(rows, bundle + 1) - row
        normed, stats = card[NORMED] + 4 * row * c, floats(card[STATS] + 8 * row, 2 * count)
        layernorm_forward(
            matrix(source + 4 * row * c, count, c), vector(card[PARAMS], gain, c), vector(card[PARAMS], bias, c),
            matrix(normed, count, c), stats[:count], stats[count:],
        )  # fmt: skip
        bundle_rows(card[NORMED], c, rows, bundle, card[NARROW])


@kernel
def _linear(card, member, bundles, rows, inputs, matrix_at, bias, start, out, outputs):
    """This member's columns of out = start + bias + rows @ matrix; bias: an offset in params, below 0 for none."""
    first, last = _share(num_strips(outputs), card[MEMBERS], member)
    bias_at = card[PARAMS] + 4 * bias if bias >= 0 else 0
    _multiply(
        bundles, rows, inputs, card[STRIPS] + matrix_at, card[HALVES], first, last, bias_at, start, out, outputs,
        0, num_bundles(rows),
    )  # fmt: skip


@kernel
def _attend(card, member, layer, rows):
    """This member's heads of the texts: keys and values of new rows into the cache, then their attention."""
    heads, c = card[HEADS], card[WIDTH]
    d = c // heads
    scale = f4(1) / np.sqrt(f4(d))
    step = 4 * (card[KEY_FLOATS] // d)  # bytes from one channel's keys to the next's
    scores = card[SCORES] + 4 * card[SCORE_FLOATS] * member
    result = scores + 4 * (card[SCORE_FLOATS] - d)
    head_floats = card[SLOT_FLOATS] // (card[LAYERS] * heads)
    first, last = _share(card[NUM_PIECES] * heads, card[MEMBERS], member)
    for item in range(first, last):
        piece = integers(card[PIECES] + 8 * PIECE_WORDS * (item // heads), PIECE_WORDS)
        head = item % heads
        keys = card[CACHE] + 4 * (piece[P_SLOT] * card[SLOT_FLOATS] + (layer * heads + head) * head_floats)
        values = keys + 4 * card[KEY_FLOATS]
        for r in range(piece[P_ROWS]):
            row, position = piece[P_ROW] + r, piece[P_POSITION] + r
            q = card[QKV] + 4 * (3 * row * c + head * d)
            key = floats(q + 4 * c, d)
            copy_floats(q + 8 * c, values + 4 * position * d, d)
            for j in range(d):
                floats(keys + step * j + 4 * position, 1)[0] = key[j]
        for r in range(piece[P_ROWS]):
            row, length = piece[P_ROW] + r, piece[P_POSITION] + r + 1
            q = card[QKV] + 4 * (3 * row * c + head * d)
            for t in range(0, length, TILE_COLUMNS):
                columns = min(TILE_COLUMNS, length - t)
                tile(1, d, q, 4, keys + 4 * t, step, 0, 0, 0, scores + 4 * t, 0, columns)
            p = floats(scores, length)
            total = exp_of_difference(p, row_max(p), scale, length)
            scale_row(p, f4(1) / total, length)
            bundle = ((row + 1) * num_bundles(rows) - 1) // rows
            start = first_row(rows, bundle)
            count = first_row(rows, bundle + 1) - start
            target = bundle_at(card[NARROW], rows, bundle, c) + 4 * (head * d * count + row - start)
            out = target if count == 1 else result
            for j in range(0, d, TILE_COLUMNS):
                tile(1, length, scores, 4, values + 4 * j, 4 * d, 0, 0, 0, out + 4 * j, 0, min(TILE_COLUMNS, d - j))
            if count > 1:
                for j in range(d):
                    floats(target + 4 * j * count, 1)[0] = floats(out + 4 * j, 1)[0]


@kernel
def _feed(card, member, rows, matrix_at, bias):
    """This member's columns of gelu(rows @ matrix + bias), in bundles."""
    f = card[FF_WIDTH]
    _linear(card, member, card[NARROW], rows, card[WIDTH], matrix_at, bias, 0, card[UP], f)
    first, last = _share(num_strips(f), card[MEMBERS], member)
    first, last = first * TILE_COLUMNS, min(last * TILE_COLUMNS, f)
    if last <= first:
        return
    for bundle in range(num_bundles(rows)):
        start = first_row(rows, bundle)
        count = first_row(rows, bundle + 1) - start
        target = bundle_at(card[WIDE], rows, bundle, f)
        for i in range(count):
            up = floats(card[UP] + 4 * ((start + i) * f + first), last - first)
            if count == 1:
                gelu_forward(up, floats(target + 4 * first, last - first))
                continue
            gelu_forward(up, up)
            out = floats(target, f * count)
            for j in range(up.size):
                out[np.uintp((first + j) * count + i)] = up[j]


@kernel
def _pass(card, member):
    """One pass, by one member of the team."""
    rows, members, team = card[ROWS], card[MEMBERS], card[TEAM]
    c, f, wanted = card[WIDTH], card[FF_WIDTH], card[NUM_WANTED]
    _embed(card, member, rows)
    meet(team, members)
    for layer in range(card[LAYERS]):
        at = card[LAYER_OFFSETS + layer * _PER_LAYER :][:_PER_LAYER]
        _norm(card, member, card[X], at[G_LN1], at[B_LN1], rows)
        meet(team, members)
        _linear(card, member, card[NARROW], rows, c, at[W_QKV], at[B_QKV], 0, card[QKV], 3 * c)
        meet(team, members)
        _attend(card, member, layer, rows)
        meet(team, members)
        _linear(card, member, card[NARROW], rows, c, at[W_ATT], at[B_ATT], card[X], card[MID], c)
        meet(team, members)
        _norm(card, member, card[MID], at[G_LN2], at[B_LN2], rows)
        meet(team, members)
        _feed(card, member, rows, at[W_UP], at[B_UP])
        meet(team, members)
        _linear(card, member, card[WIDE], rows, f, at[W_DOWN], at[B_DOWN], card[MID], card[X], c)
        meet(team, members)
    if wanted == 0:
        return
    if member == 0:
        which = integers(card[WANTED], wanted)
        for i in range(wanted):
            copy_floats(card[X] + 4 * which[i] * c, card[MID] + 4 * i * c, c)
    meet(team, members)
    _norm(card, member, card[MID], card[LNF_GAIN], card[LNF_BIAS], wanted)
    meet(team, members)
    _linear(card, member, card[NARROW], wanted, c, card[HEAD], -1, 0, card[LOGITS], card[VOCAB])
    meet(team, members)


@entry(_i8(_i8))
def run_pass(address):
    """The pass that the card at an address describes, by this thread as member 0 and its helpers. Returns 0."""
    state = flush_subnormals()
    card = _card(address)
    if card[MEMBERS] > 1:
        begin(card[TEAM])
    _pass(card, 0)
    restore(state)
    return 0


@entry(_i8(_i8, _i8))
def help_passes(address, member):
    """A helper's life: member `member` of every pass, until `stop_helpers`. Returns the number of passes."""
    state = flush_subnormals()
    card = _card(address)
    seen = 0
    while True:
        number = next_pass(card[TEAM], seen)
        if number < 0:
            restore(state)
            return seen
        seen = number
        _pass(card, member)


@entry(_i8(_i8))
def stop_helpers(address):
    """Let the helpers of a card leave."""
    stop(_card(address)[TEAM])
    return 0
