"""The ops of writing text: rows of tokens, keys and values into the cache, and the logits that are wanted.

Every row is computed as if it were alone, so that a text does not depend on what it is computed with. Each op is called
by all members of a team, and a member computes its share: of the rows, the bundles, the columns of a product, or the
heads of the texts. They meet behind every op (team.py).

N rows, C channels, H heads of D channels, T positions of a text, V vocabulary, I inputs and O outputs of a product.
Operands stand in the order of each docstring, and those in brackets may be nothing. "count" is the register with N.
"""

from __future__ import annotations

import numpy as np

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.inference import registers as W
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
from cllm_spheres.kernels.gelu import gelu_forward
from cllm_spheres.kernels.layernorm import layernorm_forward
from cllm_spheres.kernels.sizes import TILE_COLUMNS
from cllm_spheres.kernels.strips import (
    bundle_at,
    bundle_rows,
    first_row,
    multiply_strips,
    num_bundles,
    num_strips,
)
from cllm_spheres.kernels.tiles import tile
from cllm_spheres.model.record import op, opened, operand, size

_multiply = multiply_strips.external


@kernel
def _share(g, n):
    """The part [first, last) of n things that belongs to this member."""
    member, members = g[W.MEMBER], g[W.MEMBERS]
    return member * n // members, (member + 1) * n // members


@kernel
def _piece(g, i):
    return integers(g[W.PIECES] + 8 * W.PIECE_WORDS * i, W.PIECE_WORDS)


@op
def embed(record, registers):
    """tokens [V, C], positions [T, C] -> out [N, C]. Sizes: C."""
    r, g = opened(record, registers)
    rows, c = g[W.ROWS], size(r, 0)
    ids, of_tokens, of_positions, target = tokens(g[W.IDS], rows), operand(r, g, 0), operand(r, g, 1), operand(r, g, 2)
    first, last = _share(g, rows)
    for i in range(g[W.NUM_PIECES]):
        piece = _piece(g, i)
        start = piece[W.P_ROW]
        for row in range(max(first, start), min(last, start + piece[W.P_ROWS])):
            position = piece[W.P_POSITION] + row - start
            token, place = floats(of_tokens + 4 * np.int64(ids[row]) * c, c), floats(of_positions + 4 * position * c, c)
            out = floats(target + 4 * row * c, c)
            for j in range(c):
                out[j] = token[j] + place[j]
    return 0


@op
def gather(record, registers):
    """x [N, C] -> the rows of it that are wanted. Sizes: C, count (of those)."""
    r, g = opened(record, registers)
    c, wanted = size(r, 0), g[W.NUM_WANTED]
    x, out, which = operand(r, g, 0), operand(r, g, 1), integers(g[W.WANTED], wanted)
    first, last = _share(g, wanted)
    for i in range(first, last):
        copy_floats(x + 4 * which[i] * c, out + 4 * i * c, c)
    return 0


@op
def bundle(record, registers):
    """x [N, C] -> in bundles. Sizes: C, count."""
    r, g = opened(record, registers)
    c, rows = size(r, 0), g[size(r, 1)]
    first, last = _share(g, num_bundles(rows))
    for number in range(first, last):
        bundle_rows(operand(r, g, 0), c, rows, number, operand(r, g, 1))
    return 0


@op
def norm(record, registers):
    """x [N, C], gain [C], (bias [C]) -> normed [N, C], the same in bundles; mean and rstd [2 N]. Sizes: C, count."""
    r, g = opened(record, registers)
    c, rows = size(r, 0), g[size(r, 1)]
    x, normed, bias = operand(r, g, 0), operand(r, g, 3), operand(r, g, 2)
    first, last = _share(g, num_bundles(rows))
    for number in range(first, last):
        row = first_row(rows, number)
        count = first_row(rows, number + 1) - row
        stats = floats(operand(r, g, 5) + 8 * row, 2 * count)
        layernorm_forward(
            matrix(x + 4 * row * c, count, c), floats(operand(r, g, 1), c), floats(bias, c if bias != 0 else 0),
            matrix(normed + 4 * row * c, count, c), stats[:count], stats[count:],
        )  # fmt: skip
        bundle_rows(normed, c, rows, number, operand(r, g, 4))
    return 0


@kernel
def _product(r, g, start, out):
    """This member's columns [first, last) of out = start + bias + x @ w, and how many rows there are."""
    inputs, outputs, halves, rows = size(r, 0), size(r, 1), size(r, 2), g[size(r, 3)]
    first, last = _share(g, num_strips(outputs))
    _multiply(
        operand(r, g, 0), rows, inputs, operand(r, g, 1), halves, first, last, operand(r, g, 2), start, out, outputs,
        0, num_bundles(rows),
    )  # fmt: skip
    return first * TILE_COLUMNS, min(last * TILE_COLUMNS, outputs), rows


@op
def linear(record, registers):
    """x [N, I] in bundles, w [I, O] in strips, (bias [O]), (start [N, O]) -> out [N, O], which may be start.

    out = start + bias + x @ w. Sizes: I, O, whether the strips are bfloat16, count.
    """
    r, g = opened(record, registers)
    _product(r, g, operand(r, g, 3), operand(r, g, 4))
    return 0


@op
def linear_gelu(record, registers):
    """x [N, I] in bundles, w [I, O] in strips, (bias [O]); room [N, O] -> out [N, O] in bundles.

    out = gelu(bias + x @ w). Sizes: I, O, whether the strips are bfloat16, count.
    """
    r, g = opened(record, registers)
    outputs, room = size(r, 1), operand(r, g, 3)
    first, last, rows = _product(r, g, 0, room)
    if last <= first:
        return 0
    for number in range(num_bundles(rows)):
        start = first_row(rows, number)
        count = first_row(rows, number + 1) - start
        target = bundle_at(operand(r, g, 4), rows, number, outputs)
        for i in range(count):
            row = floats(room + 4 * ((start + i) * outputs + first), last - first)
            if count == 1:
                gelu_forward(row, floats(target + 4 * first, last - first))
                continue
            gelu_forward(row, row)
            out = floats(target, outputs * count)
            for j in range(row.size):
                out[np.uintp((first + j) * count + i)] = row[j]
    return 0


@op
def attention(record, registers):
    """qkv [N, 3 C], the cache from this layer's place in slot 0 on -> out [N, C] in bundles; scores of all members.

    Keys and values of the new rows go into the cache, then come their attentions. Sizes: H, D, floats of the keys of a
    head, of its keys and values, of a slot, and of a member's scores.
    """
    r, g = opened(record, registers)
    heads, d, key_floats, head_floats, slot_floats, room = (
        size(r, 0), size(r, 1), size(r, 2), size(r, 3), size(r, 4), size(r, 5)
    )  # fmt: skip
    rows, c = g[W.ROWS], heads * d
    scale = f4(1) / np.sqrt(f4(d))
    step = 4 * (key_floats // d)  # bytes from one channel's keys to the next's
    qkv, cache, bundles = operand(r, g, 0), operand(r, g, 1), operand(r, g, 2)
    scores = operand(r, g, 3) + 4 * room * g[W.MEMBER]
    result = scores + 4 * (room - d)
    first, last = _share(g, g[W.NUM_PIECES] * heads)
    for item in range(first, last):
        piece, head = _piece(g, item // heads), item % heads
        keys = cache + 4 * (piece[W.P_SLOT] * slot_floats + head * head_floats)
        values = keys + 4 * key_floats
        for i in range(piece[W.P_ROWS]):
            row, position = piece[W.P_ROW] + i, piece[W.P_POSITION] + i
            q = qkv + 4 * (3 * row * c + head * d)
            key = floats(q + 4 * c, d)
            copy_floats(q + 8 * c, values + 4 * position * d, d)
            for j in range(d):
                floats(keys + step * j + 4 * position, 1)[0] = key[j]
        for i in range(piece[W.P_ROWS]):
            row, length = piece[W.P_ROW] + i, piece[W.P_POSITION] + i + 1
            q = qkv + 4 * (3 * row * c + head * d)
            for t in range(0, length, TILE_COLUMNS):
                columns = min(TILE_COLUMNS, length - t)
                tile(1, d, q, 4, keys + 4 * t, step, 0, 0, 0, scores + 4 * t, 0, columns)
            p = floats(scores, length)
            total = exp_of_difference(p, row_max(p), scale, length)
            scale_row(p, f4(1) / total, length)
            number = ((row + 1) * num_bundles(rows) - 1) // rows
            start = first_row(rows, number)
            count = first_row(rows, number + 1) - start
            target = bundle_at(bundles, rows, number, c) + 4 * (head * d * count + row - start)
            out = target if count == 1 else result
            for j in range(0, d, TILE_COLUMNS):
                tile(1, length, scores, 4, values + 4 * j, 4 * d, 0, 0, 0, out + 4 * j, 0, min(TILE_COLUMNS, d - j))
            if count > 1:
                for j in range(d):
                    floats(target + 4 * j * count, 1)[0] = floats(out + 4 * j, 1)[0]
    return 0
