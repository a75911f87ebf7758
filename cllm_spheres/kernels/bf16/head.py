"""The tied head with softmax and cross-entropy, some columns of the vocabulary at a time, on bfloat16 tiles.

N rows, C channels, V vocabulary. A row's largest logit and sum of exponentials are needed before its gradient. The
logits in between are kept where there is room for them, else computed twice: the same bits, so whoever calls chooses
what is quicker.
"""

from __future__ import annotations

import numpy as np
from numba import types

from cllm_spheres.crystal.functions.double import log
from cllm_spheres.crystal.functions.single import exp
from cllm_spheres.crystal.jit import entry, kernel
from cllm_spheres.kernels.arrays import doubles, f4, floats, integers, row_sum, tokens
from cllm_spheres.kernels.bf16.multiply import block_row, product
from cllm_spheres.kernels.bf16.rows import largest_in_row, softmax_gradient_row, sum_of_exp
from cllm_spheres.kernels.bf16.sizes import CHUNK
from cllm_spheres.kernels.bf16.tiles import TILE, columns_of, line_of, padded, round_one, round_row
from cllm_spheres.kernels.soft_targets import expected_logit, is_uniform, row_of, share_of

_i8, _d8 = types.int64, types.float64
_LOWEST = f4(-1e30)  # smaller than any logit


@kernel
def _logits(x, row, inner, wte_flipped, first, count, out, stride):
    """32 rows of logits for `count` columns from `first` (a multiple of 32), `stride` floats from row to row."""
    step = inner // 32 * TILE
    block_row(inner, x + row // 16 * step, step, wte_flipped, first // 32, (count + 31) // 32, out, stride)


@kernel
def _place(kept, scratch, row, first, vocabulary):
    """Where 32 rows of logits go, and their stride: each to its own place, or all to the same where none are kept."""
    stride = padded(vocabulary)
    return (kept + 4 * (row * stride + first), stride) if kept != 0 else (scratch, types.int64(CHUNK))


@kernel
def _begin(largest_N, sums_N, at_target_N):
    for n in range(largest_N.size):
        largest_N[n] = _LOWEST
        sums_N[n] = f4(0)
        at_target_N[n] = f4(0)


@kernel
def _find_beaten(logits, stride, first_row, targets_N, first, count, largest_N, beaten_N):
    """beaten = 1 for rows of which a lower id has no smaller logit than the target, else 0; before `_take_in`."""
    for r in range(32):
        n = first_row + r
        target = targets_N[n] - first
        if target >= 0 and target < count:
            row = floats(logits + 4 * stride * r, count)
            beaten = largest_N[n] >= row[target]
            for j in range(target):
                beaten |= row[j] >= row[target]
            beaten_N[n] = f4(1) if beaten else f4(0)


@kernel
def _take_in(logits, stride, first_row, targets_N, first, count, largest_N, sums_N, at_target_N):
    """Add a block's columns to its rows' running maxima and sums of exponentials."""
    for r in range(32):
        n = first_row + r
        row, groups, rest = logits + 4 * stride * r, count // 32, count % 32
        largest = largest_in_row(row, groups, rest, largest_N[n])
        sums_N[n] = sums_N[n] * exp(largest_N[n] - largest) + sum_of_exp(row, groups, rest, largest)
        largest_N[n] = largest
        target = targets_N[n] - first
        if target >= 0 and target < count:
            at_target_N[n] = floats(row, count)[target]


@kernel
def _take_in_soft(soft, logits, stride, first_row, targets_N, first, count, expected_N):
    """Add what a block's columns have of each row's sum of q * logits."""
    for r in range(32):
        target = np.int64(targets_N[first_row + r])
        if target >= 0:
            row = floats(logits + 4 * stride * r, count)
            expected_N[first_row + r] += row_sum(row) if is_uniform(soft) else expected_logit(soft, target, row, first)


@kernel
def _gradient(soft, logits, stride, first_row, targets_N, first, count, vocabulary, lse_N, scale, form, columns):
    """rows form of (softmax - (1 - alpha) onehot - alpha q) * scale; rows with a negative target are padding: zero."""
    alpha = share_of(soft)
    everywhere = f4(scale * alpha / vocabulary) if is_uniform(soft) else f4(0)
    for r in range(32):
        n = first_row + r
        target = np.int64(targets_N[n])
        row, line = logits + 4 * stride * r, line_of(form, n, columns)
        if target < 0:
            floats(row, columns)[:] = f4(0)
            round_row(row, line, columns // 32, TILE)
            continue
        softmax_gradient_row(row, line, count // 32, count % 32, lse_N[n], f4(scale), everywhere)
        _subtract(row, line, count, target - first, lse_N[n], scale, everywhere + f4(scale * (1.0 - alpha)))
        if soft != 0:
            ids, weights = row_of(soft, target)
            for k in range(ids.size):
                _subtract(row, line, count, ids[k] - first, lse_N[n], scale, f4(scale * alpha * weights[k]))


@kernel
def _subtract(row, line, count, j, lse, scale, share):
    """Element j of a line of `_gradient` anew, where it is one of `count`: less by its share of the targets."""
    if 0 <= j < count:
        e = exp(floats(row, count)[j] - lse) * f4(scale)
        round_one(e - share, line + j // 32 * TILE + j % 32 * 2)


@kernel
def _finish(targets_N, largest_N, sums_N, at_target_N):
    """Sum of the rows' losses, float64; largest_N becomes the log-sum-exp."""
    loss = 0.0
    for n in range(targets_N.size):
        log_sum = log(np.float64(sums_N[n]))
        if targets_N[n] >= 0:
            loss += log_sum + (np.float64(largest_N[n]) - np.float64(at_target_N[n]))
        largest_N[n] = f4(np.float64(largest_N[n]) + log_sum)
    return loss


@kernel
def _sums(x, inner, wte_flipped, vocabulary, targets_N, stats, scratch, kept, beaten_N, soft, expected_N):
    """Each row's largest logit, sum of exponentials and logit of the target; beaten_N, where it is not empty.

    With a card of soft targets also each row's sum of q * logits, undivided where q is uniform.
    """
    n = targets_N.size
    largest_N, sums_N, at_target_N = stats[:n], stats[n : 2 * n], stats[2 * n : 3 * n]
    _begin(largest_N, sums_N, at_target_N)
    for first in range(0, vocabulary, CHUNK):
        count = min(CHUNK, vocabulary - first)
        for row in range(0, n, 32):
            logits, stride = _place(kept, scratch, row, first, vocabulary)
            _logits(x, row, inner, wte_flipped, first, count, logits, stride)
            if beaten_N.size > 0:
                _find_beaten(logits, stride, row, targets_N, first, count, largest_N, beaten_N)
            _take_in(logits, stride, row, targets_N, first, count, largest_N, sums_N, at_target_N)
            if soft != 0:
                _take_in_soft(soft, logits, stride, row, targets_N, first, count, expected_N)
    return largest_N, sums_N, at_target_N


@entry(_d8(*[_i8] * 9))
def head_loss(x, width, wte_flipped, vocabulary, n, targets, stats, scratch, correct):
    """Sum of the token losses, float64, of n rows. x: rows form; wte_flipped: flipped form of wte. Addresses.

    targets: int32, -1 for padding rows. stats: 4 n float32 of scratch; scratch: 32 x CHUNK float32. correct: of an
    int64, which becomes the number of targets that are the likeliest token; of equal logits the lowest id is it.
    """
    targets_N, stats_4N = tokens(targets, n), floats(stats, 4 * n)
    beaten_N = stats_4N[3 * n :]
    largest_N, sums_N, at_target_N = _sums(
        x, padded(width), wte_flipped, vocabulary, targets_N, stats_4N, scratch, 0, beaten_N, 0, doubles(stats, 0)
    )
    count = 0
    for r in range(n):
        if targets_N[r] >= 0 and at_target_N[r] == largest_N[r] and beaten_N[r] == f4(0):
            count += 1
    integers(correct, 1)[0] = count
    return _finish(targets_N, largest_N, sums_N, at_target_N)


@kernel
def _excess(soft, vocabulary, targets_N, at_target_N, expected_N):
    """alpha times what the soft targets add to the losses of the rows, float64."""
    excess, alpha, divisor = 0.0, share_of(soft), vocabulary if is_uniform(soft) else 1
    for n in range(targets_N.size):
        if targets_N[n] >= 0:
            excess += alpha * (np.float64(at_target_N[n]) - expected_N[n] / divisor)
    return excess


@entry(_d8(*[_i8] * 17, _d8))
def head_loss_backward(
    x, x_pairs, width, wte_flipped, wte_pairs, vocabulary, n, targets, soft, stats, scratch, kept, form, turned, dx,
    dwte, accumulate, scale,
):  # fmt: skip
    """As head_loss; also dx = scale * dloss/dx (overwrites) and dwte (+)= (`accumulate` 0 overwrites), float32; 0 where
    one is not wanted.

    x_pairs: pairs form of x; wte_pairs: pairs form of wte. soft: a card of soft_targets.py, or 0. stats: 5 n + 2
    float32, of which the last two become a float64: what soft targets add to the loss, and to what is differentiated.
    kept: room for n x V float32, V padded, or 0: then logits are computed twice. form, turned: room for n x CHUNK
    bfloat16 each.
    """
    inner, targets_N, stats_3N = padded(width), tokens(targets, n), floats(stats, 3 * n)
    nobody, expected_N = stats_3N[:0], doubles(stats + 12 * n, n)
    expected_N[:] = 0.0
    largest_N, sums_N, at_target_N = _sums(
        x, inner, wte_flipped, vocabulary, targets_N, stats_3N, scratch, kept, nobody, soft, expected_N
    )
    loss = _finish(targets_N, largest_N, sums_N, at_target_N)  # the first n of stats are the log-sum-exps now
    doubles(stats + 20 * n, 1)[0] = _excess(soft, vocabulary, targets_N, at_target_N, expected_N) if soft != 0 else 0.0
    strip = padded(vocabulary) // 32 * TILE
    for first in range(0, vocabulary, CHUNK):
        count = min(CHUNK, vocabulary - first)
        columns = padded(count)
        for row in range(0, n, 32):
            logits, stride = _place(kept, scratch, row, first, vocabulary)
            if kept == 0:
                _logits(x, row, inner, wte_flipped, first, count, logits, stride)
            _gradient(soft, logits, stride, row, targets_N, first, count, vocabulary, stats_3N, scale, form, columns)
        if dx != 0:
            product(n, width, columns, form, columns // 32 * TILE, wte_pairs + first // 32 * TILE, strip, dx, width,
                    first > 0, scratch)  # fmt: skip
        if dwte != 0:
            columns_of(form, turned, n, columns)
            product(count, width, n, turned, n // 32 * TILE, x_pairs, n // 32 * TILE, dwte + 4 * first * width, width,
                    accumulate != 0, scratch)  # fmt: skip
    return loss
