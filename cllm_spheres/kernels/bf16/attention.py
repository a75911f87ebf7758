"""Causal multi-head attention on bfloat16 tiles; scores and softmax in float32.

N = B * T rows, T padded to 32; H heads of D channels, each padded to E = 32, 64, ... columns. qkv lies in rows,
3 H E columns: queries, keys, values, each head after head. Blocks of 32 queries look at the keys up to their own
last one. The backward computes the probabilities again from the stored log-sum-exp. Padding rows come after the
real ones, so that no real row sees them, and their gradients are zero.
"""

from __future__ import annotations

import numpy as np
from numba import types

from cllm_spheres.crystal.functions.double import log
from cllm_spheres.crystal.jit import entry, kernel
from cllm_spheres.crystal.random import combine
from cllm_spheres.kernels.arrays import f4, floats
from cllm_spheres.kernels.bf16.multiply import block, block_row
from cllm_spheres.kernels.bf16.rows import dot_lines, scale_row, score_gradient_row, softmax_row
from cllm_spheres.kernels.bf16.tiles import (
    TILE,
    flip_tile,
    line_of,
    pair_block,
    round_row,
    transpose_block,
    widen_row,
)  # fmt: skip
from cllm_spheres.kernels.dropout import dropout

_i8 = types.int64


@kernel
def _flipped_strips(source, step, t, e, target):
    """flipped form of one head's [t, e] out of a rows form with `step` bytes between groups of 16 rows."""
    for i in range(t // 16):
        for j in range(e // 32):
            flip_tile(source + i * step + j * TILE, target + (i * (e // 32) + j) * TILE)


@kernel
def _pairs_strips(source, step, t, e, target):
    """pairs form of one head's [t, e]."""
    down = t // 32
    for i in range(down):
        for j in range(e // 32):
            upper = source + 2 * i * step + j * TILE
            at = target + (2 * j * down + i) * TILE
            pair_block(upper, upper + step, at, at + down * TILE)


@kernel
def _columns_strips(source, step, t, e, target):
    """columns form of one head's [t, e]."""
    _pairs_strips(source, step, t, e, target)
    for i in range(t * e // 512):
        flip_tile(target + i * TILE, target + i * TILE)


@kernel
def _drop(line, groups, row, first_index, real, key, threshold, keep_scale):
    """Dropout of a row of probabilities in lines; row: address of room for it as float32."""
    widen_row(line, row, groups, TILE)
    dropout(floats(row, real), first_index, key, threshold, f4(keep_scale))
    round_row(row, line, groups, TILE)


@kernel
def _scores(q, step, keys_flipped, e, first, scores, t):
    """scores[32, first + 32] = q k^T for the 32 queries at `first`, unscaled."""
    block_row(e, q + first // 16 * step, step, keys_flipped, 0, first // 32 + 1, scores, t)


@entry(_i8(*[_i8] * 12, types.float64))
def attention_forward(
    qkv, sequences, t, heads, d, key, first_sequence, length, threshold, scratch, out, lse, keep_scale
):
    """out = softmax(q k^T / sqrt(d)) v in rows form, H E columns.

    lse: float32[B, H, T], the log-sum-exp of each row of scores. t: padded length, length: the real one.
    key, first_sequence, threshold, keep_scale: dropout of the probabilities.
    """
    e = (d + 31) // 32 * 32
    wide = heads * e
    step = 3 * wide // 32 * TILE
    scale = f4(1) / np.sqrt(f4(d))
    scores = scratch
    probabilities = scores + 32 * t * 4
    keys, values = probabilities + 32 * t * 2, probabilities + 32 * t * 2 + t * e * 2
    result = values + t * e * 2
    stats = result + 32 * e * 4
    stats_64 = floats(stats, 64)
    for b in range(sequences):
        for h in range(heads):
            q = qkv + b * (t // 16) * step + h * (e // 32) * TILE
            _flipped_strips(q + wide // 32 * TILE, step, t, e, keys)
            _pairs_strips(q + 2 * (wide // 32) * TILE, step, t, e, values)
            lse_T = floats(lse + 4 * (b * heads + h) * t, t)
            head_key = combine(combine(np.uint64(key), first_sequence + b), h)
            for first in range(0, t, 32):
                seen = first + 32
                _scores(q, step, keys, e, first, scores, t)
                for r in range(32):
                    row, line = scores + 4 * r * t, line_of(probabilities, r, seen)
                    softmax_row(row, line, seen // 32, r + 1, scale, stats + 8 * r)
                    if threshold > 0:
                        _drop(
                            line, seen // 32, row, (first + r) * length, first + r + 1, head_key, threshold, keep_scale
                        )
                strip = seen // 32 * TILE
                for j in range(e // 32):
                    block(
                        seen // 32, probabilities, strip, values + 2 * j * (t // 32) * TILE, t // 32 * TILE,
                        result + 128 * j, 4 * e, 0,
                    )  # fmt: skip
                for r in range(32):
                    line = line_of(out, b * t + first + r, wide) + h * (e // 32) * TILE
                    scale_row(result + 4 * r * e, line, e // 32, f4(1) / stats_64[2 * r + 1])
                    lse_T[first + r] = stats_64[2 * r] + f4(log(np.float64(stats_64[2 * r + 1])))
    return 0


@kernel
def _to_rows(transposed, e, row, form, columns, group):
    """32 keys' gradients, transposed as float32[e, 32] -> the head's lines in rows form; their column sums are left
    to the caller. form: rows form of `columns` columns; group: first group of 32 columns of the head."""
    for j in range(e // 32):
        transpose_block(transposed + j * 32 * 128)
        for r in range(32):
            round_row(
                transposed + j * 32 * 128 + 128 * r, line_of(form, row + r, columns) + (group + j) * TILE, 1, TILE
            )


@entry(_i8(*[_i8] * 14, types.float64))
def attention_backward(
    dout, qkv, out, lse, sequences, t, heads, d, key, first_sequence, length, threshold, scratch, dqkv, keep_scale
):
    """dqkv in rows form from dout in rows form and what the forward left; overwrites dqkv.

    With P the probabilities, Pd after dropout, and Delta_i = dout_i . out_i:
    dv = Pd^T dout; dP = dropout(dout v^T); dS = P * (dP - Delta) / sqrt(D); dq = dS k; dk = dS^T q. The last two
    products over queries are computed transposed, dv^T = dout^T Pd, so that only their small left operands turn.
    """
    e = (d + 31) // 32 * 32
    wide = heads * e
    step, out_step = 3 * wide // 32 * TILE, wide // 32 * TILE
    scale = f4(1) / np.sqrt(f4(d))
    strip, down = t * e * 2, t // 32
    p, dp = scratch, scratch + 32 * t * 4
    p_rows = dp + 32 * t * 4
    ds_rows = p_rows + 32 * t * 2
    p_pairs = ds_rows + 32 * t * 2
    ds_pairs = p_pairs + t * t * 2
    keys_flipped = ds_pairs + t * t * 2
    values_flipped, keys_pairs = keys_flipped + strip, keys_flipped + 2 * strip
    q_columns, dout_columns = keys_flipped + 3 * strip, keys_flipped + 4 * strip
    result = keys_flipped + 5 * strip
    for b in range(sequences):
        for h in range(heads):
            group = h * (e // 32)
            q = qkv + b * (t // 16) * step + group * TILE
            k, v = q + wide // 32 * TILE, q + 2 * (wide // 32) * TILE
            do = dout + b * (t // 16) * out_step + group * TILE
            _flipped_strips(k, step, t, e, keys_flipped)
            _flipped_strips(v, step, t, e, values_flipped)
            _pairs_strips(k, step, t, e, keys_pairs)
            _columns_strips(q, step, t, e, q_columns)
            _columns_strips(do, out_step, t, e, dout_columns)
            lse_T = floats(lse + 4 * (b * heads + h) * t, t)
            head_key = combine(combine(np.uint64(key), first_sequence + b), h)
            for first in range(0, t, 32):
                seen = first + 32
                _scores(q, step, keys_flipped, e, first, p, t)
                _scores(do, out_step, values_flipped, e, first, dp, t)
                for r in range(32):
                    row, drow = p + 4 * r * t, dp + 4 * r * t
                    at = line_of(0, b * t + first + r, wide) + group * TILE
                    delta = dot_lines(dout + at, out + at, e // 32)
                    where, real = (first + r) * length, first + r + 1
                    if threshold > 0:
                        dropout(floats(drow, real), where, head_key, threshold, f4(keep_scale))
                    p_line, ds_line = line_of(p_rows, r, seen), line_of(ds_rows, r, seen)
                    score_gradient_row(row, drow, p_line, ds_line, seen // 32, r + 1, scale, lse_T[first + r], delta)
                    if threshold > 0:
                        _drop(p_line, seen // 32, row, where, real, head_key, threshold, keep_scale)
                line = seen // 32 * TILE
                for j in range(seen // 32):
                    at = (2 * j * down + first // 32) * TILE
                    upper = p_rows + j * TILE
                    pair_block(upper, upper + line, p_pairs + at, p_pairs + at + down * TILE)
                    upper = ds_rows + j * TILE
                    pair_block(upper, upper + line, ds_pairs + at, ds_pairs + at + down * TILE)
                for j in range(e // 32):
                    block(
                        seen // 32, ds_rows, line, keys_pairs + 2 * j * down * TILE, down * TILE,
                        result + 128 * j, 4 * e, 0,
                    )  # fmt: skip
                for r in range(32):
                    target = line_of(dqkv, b * t + first + r, 3 * wide) + group * TILE
                    round_row(result + 4 * r * e, target, e // 32, TILE)
            for j in range(down):  # 32 keys, seen by the queries from the same block on
                for what in range(2):
                    left, right = (q_columns, ds_pairs) if what == 0 else (dout_columns, p_pairs)
                    for i in range(e // 32):
                        block(
                            down - j, left + (2 * i * down + j) * TILE, down * TILE,
                            right + (2 * j * down + j) * TILE, down * TILE, result + i * 32 * 128, 128, 0,
                        )  # fmt: skip
                    _to_rows(result, e, b * t + 32 * j, dqkv, 3 * wide, (what + 1) * (wide // 32) + group)
    return 0
