"""The tied head with softmax and cross-entropy, a few rows at a time: the logits of a batch never exist at once.

R rows of a chunk, C channels, V vocabulary.
"""

from __future__ import annotations

import numpy as np

from cllm_spheres.crystal.functions.double import log
from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels.arrays import exp_of_difference, f4, row_max, row_sum, scale_row, shift_row
from cllm_spheres.kernels.products import gemm
from cllm_spheres.kernels.soft_targets import expected_logit, is_uniform, row_of, share_of


@kernel
def _mean_logit(soft, target, row):
    """The sum of q * logits of a row, float64."""
    return np.float64(row_sum(row)) / row.size if is_uniform(soft) else expected_logit(soft, target, row, 0)


@kernel
def _subtract_targets(soft, target, scale, row):
    """row -= scale * ((1 - alpha) onehot + alpha q)."""
    alpha = share_of(soft)
    row[target] -= f4(scale * (1.0 - alpha))
    if is_uniform(soft):
        shift_row(row, -f4(scale * alpha / row.size))
    ids, weights = row_of(soft, target)
    for k in range(ids.size):
        row[ids[k]] -= f4(scale * alpha * weights[k])


@kernel
def softmax_cross_entropy(logits_RV, targets_R, scale, soft):
    """Two sums over the rows, float64: -log softmax(logits)[target], and alpha times what soft targets add to it.

    The logits become the gradient of both, times `scale`: (softmax - (1 - alpha) onehot - alpha q) * scale. soft: the
    address of a card of soft_targets.py, 0 for none.
    """
    loss = excess = 0.0
    alpha, n = share_of(soft), logits_RV.shape[1]
    for r in range(targets_R.size):
        row, target = logits_RV[r], np.int64(targets_R[r])
        largest = row_max(row)
        at_target = row[target]
        if soft != 0:
            excess += alpha * (np.float64(at_target) - _mean_logit(soft, target, row))
        total = exp_of_difference(row, largest, f4(1), n)
        loss += log(np.float64(total)) + (np.float64(largest) - np.float64(at_target))
        scale_row(row, scale / total, n)
        if soft == 0:
            row[target] -= scale
        else:
            _subtract_targets(soft, target, np.float64(scale), row)
    return loss, excess


@kernel
def count_correct(logits_RV, targets_R):
    """How many rows have their target as the likeliest token: of equal logits the lowest id is the likeliest."""
    count = 0
    for r in range(targets_R.size):
        row = logits_RV[r]
        largest = row[targets_R[r]]
        if largest == row_max(row):
            likeliest = 0
            while row[likeliest] != largest:
                likeliest += 1
            count += 1 if likeliest == targets_R[r] else 0
    return count


@kernel
def head_loss(x_NC, wte_VC, targets_N, logits_RV, scratch, correct_1):
    """Sum of the token losses, float64, without gradients; correct_1, int64: the targets that were the likeliest.

    logits_RV: scratch of R rows; scratch: as in linear.py.
    """
    n, c, v, rows = x_NC.shape[0], x_NC.shape[1], wte_VC.shape[0], logits_RV.shape[0]
    loss = 0.0
    correct_1[0] = 0
    for start in range(0, n, rows):
        r = min(rows, n - start)
        x = x_NC[start : start + r]
        gemm(
            False, True, r, v, c, x.ctypes.data, c, wte_VC.ctypes.data, c, 0, 0, 0, logits_RV.ctypes.data, v, scratch
        )  # fmt: skip
        correct_1[0] += count_correct(logits_RV[:r], targets_N[start : start + r])
        loss += softmax_cross_entropy(logits_RV[:r], targets_N[start : start + r], f4(0), 0)[0]
    return loss


@kernel
def head_loss_backward(x_NC, wte_VC, targets_N, scale, soft, logits_RV, dx, dwte, accumulate, scratch):
    """The two sums of softmax_cross_entropy; also dx = scale * d(both)/dx (overwrites), dwte (+)= (`accumulate` false
    overwrites): addresses, 0 where one is not wanted.
    """
    n, c, v, rows = x_NC.shape[0], x_NC.shape[1], wte_VC.shape[0], logits_RV.shape[0]
    logits, wte = logits_RV.ctypes.data, wte_VC.ctypes.data
    loss = excess = 0.0
    for start in range(0, n, rows):
        r = min(rows, n - start)
        x = x_NC[start : start + r].ctypes.data
        gemm(False, True, r, v, c, x, c, wte, c, 0, 0, 0, logits, v, scratch)
        of_rows = softmax_cross_entropy(logits_RV[:r], targets_N[start : start + r], scale, soft)
        loss, excess = loss + of_rows[0], excess + of_rows[1]
        if dx != 0:
            gemm(False, False, r, c, v, logits, v, wte, c, 0, 0, 0, dx + 4 * start * c, c, scratch)
        if dwte != 0:
            gemm(True, False, v, c, r, logits, v, x, c, dwte if accumulate or start > 0 else 0, c, 0, dwte, c, scratch)
    return loss, excess
