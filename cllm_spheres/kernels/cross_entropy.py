"""The tied head with softmax and cross-entropy, a few rows at a time: the logits of a batch never exist at once.

R rows of a chunk, C channels, V vocabulary.
"""

from __future__ import annotations

import numpy as np

from cllm_spheres.crystal.functions import log
from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels.arrays import exp_of_difference, f4, row_max, scale_row
from cllm_spheres.kernels.products import gemm


@kernel
def softmax_cross_entropy(logits_RV, targets_R, scale):
    """Sum of -log softmax(logits)[target] over the rows, float64; logits become their gradient times `scale`.

    The gradient is (softmax - onehot) * scale.
    """
    loss = 0.0
    n = logits_RV.shape[1]
    for r in range(targets_R.size):
        row, target = logits_RV[r], targets_R[r]
        largest = row_max(row)
        at_target = row[target]
        total = exp_of_difference(row, largest, f4(1), n)
        loss += log(np.float64(total)) + (np.float64(largest) - np.float64(at_target))
        scale_row(row, scale / total, n)
        row[target] -= scale
    return loss


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
        loss += softmax_cross_entropy(logits_RV[:r], targets_N[start : start + r], f4(0))
    return loss


@kernel
def head_loss_backward(x_NC, wte_VC, targets_N, scale, logits_RV, dx_NC, dwte_VC, accumulate, scratch):
    """As head_loss; also dx = scale * dloss/dx (overwrites), dwte (+)= (`accumulate` false overwrites)."""
    n, c, v, rows = x_NC.shape[0], x_NC.shape[1], wte_VC.shape[0], logits_RV.shape[0]
    logits, wte, dwte = logits_RV.ctypes.data, wte_VC.ctypes.data, dwte_VC.ctypes.data
    loss = 0.0
    for start in range(0, n, rows):
        r = min(rows, n - start)
        x, dx = x_NC[start : start + r].ctypes.data, dx_NC[start : start + r].ctypes.data
        gemm(False, True, r, v, c, x, c, wte, c, 0, 0, 0, logits, v, scratch)
        loss += softmax_cross_entropy(logits_RV[:r], targets_N[start : start + r], scale)
        gemm(False, False, r, c, v, logits, v, wte, c, 0, 0, 0, dx, c, scratch)
        gemm(True, False, v, c, r, logits, v, x, c, dwte if accumulate or start > 0 else 0, c, 0, dwte, c, scratch)
    return loss
