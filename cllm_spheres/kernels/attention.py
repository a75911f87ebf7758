"""Causal multi-head attention, a block of queries at a time against the keys they may see.

N = B * T rows, C channels, H heads of width D = C / H. qkv_N3C holds queries, keys and values side by side.
A block of Q queries looks only at keys up to its own last one: the masked half is skipped but for the blocks on
the diagonal. The backward computes the probabilities again from the stored log-sum-exp, so that memory grows
with T and not with T squared. Source: Vaswani et al. (2017); the recomputation is Dao et al., FlashAttention (2022).
"""

from __future__ import annotations

import numpy as np
from numba import types

from cllm_spheres.crystal.functions.double import log
from cllm_spheres.crystal.functions.exponential import exp
from cllm_spheres.crystal.jit import kernel
from cllm_spheres.crystal.lanes import load, over, spread, store, vectorised
from cllm_spheres.crystal.random import combine
from cllm_spheres.kernels.arrays import dot, exp_of_difference, f4, floats, row_max, scale_row
from cllm_spheres.kernels.dropout import dropout
from cllm_spheres.kernels.products import gemm
from cllm_spheres.kernels.sizes import QUERY_BLOCK


@kernel
def attention_forward(qkv_N3C, length, heads, key, first_sequence, threshold, keep_scale, scratch, out_NC, lse_BHT):
    """out = softmax(q k^T / sqrt(D)) v; overwrites out and lse_BHT, the log-sum-exp of each row of scores.

    key, first_sequence (the number of sequence 0 in the whole batch), threshold, keep_scale: dropout of the
    probabilities (threshold 0 is off).
    """
    width = out_NC.shape[1]
    d, wide = width // heads, 3 * width
    scale = f4(1) / np.sqrt(f4(d))
    scores = scratch.ctypes.data
    products = scores + 8 * QUERY_BLOCK * length
    for b in range(out_NC.shape[0] // length):
        for h in range(heads):
            q = qkv_N3C.ctypes.data + 4 * (b * length * wide + h * d)
            out = out_NC.ctypes.data + 4 * (b * length * width + h * d)
            lse_T = lse_BHT[(b * heads + h) * length : (b * heads + h + 1) * length]
            head_key = combine(combine(key, first_sequence + b), h)
            for first in range(0, length, QUERY_BLOCK):
                last = min(first + QUERY_BLOCK, length)
                rows = last - first
                gemm(
                    False, True, rows, last, d, q + 4 * first * wide, wide, q + 4 * width, wide, 0, 0, 0, scores, last,
                    products,
                )  # fmt: skip
                for r in range(rows):
                    i = first + r
                    row = floats(scores + 4 * r * last, last)
                    largest = row_max(row[: i + 1])
                    total = exp_of_difference(row, largest, scale, i + 1)
                    lse_T[i] = largest * scale + f4(log(np.float64(total)))
                    scale_row(row, f4(1) / total, i + 1)
                    for j in range(i + 1, last):
                        row[j] = f4(0)
                    if threshold > 0:
                        dropout(row[: i + 1], i * length, head_key, threshold, keep_scale)
                v, out_rows = q + 8 * width, out + 4 * first * width
                gemm(False, False, rows, d, last, scores, last, v, wide, 0, 0, 0, out_rows, width, products)


@vectorised(types.int64, types.int64, types.int64, types.float32, types.float32, types.float32)
def _score_gradients(b, p, dp, n, scale, lse, delta):
    """p: scores -> probabilities; dp: their gradients -> gradients of the scaled scores, in place."""
    wide, shift, mean = spread(b, scale), spread(b, lse), spread(b, delta)

    def take(at, mask):
        probability = exp(load(b, p, at, mask) * wide - shift)
        store(probability, p, at, mask)
        store(probability * ((load(b, dp, at, mask) - mean) * wide), dp, at, mask)

    over(b, n, take)


@kernel
def attention_backward(
    dout_NC,
    qkv_N3C,
    out_NC,
    lse_BHT,
    length,
    heads,
    key,
    first_sequence,
    threshold,
    keep_scale,
    scratch,
    dqkv_N3C,
):
    """dqkv_N3C from dout and what the forward left; overwrites dqkv.

    With P the probabilities, Pd after dropout, and Delta_i = dout_i . out_i:
    dv = Pd^T dout; dP = dropout(dout v^T); dS = P * (dP - Delta) / sqrt(D); dq = dS k; dk = dS^T q.
    """
    width = out_NC.shape[1]
    d, wide = width // heads, 3 * width
    scale = f4(1) / np.sqrt(f4(d))
    p_address = scratch.ctypes.data
    dp_address = p_address + 4 * QUERY_BLOCK * length
    products = dp_address + 4 * QUERY_BLOCK * length
    for b in range(out_NC.shape[0] // length):
        for h in range(heads):
            q = qkv_N3C.ctypes.data + 4 * (b * length * wide + h * d)
            dq = dqkv_N3C.ctypes.data + 4 * (b * length * wide + h * d)
            k, v, dk, dv = q + 4 * width, q + 8 * width, dq + 4 * width, dq + 8 * width
            dout = dout_NC.ctypes.data + 4 * (b * length * width + h * d)
            lse_T = lse_BHT[(b * heads + h) * length : (b * heads + h + 1) * length]
            head_key = combine(combine(key, first_sequence + b), h)
            # From the last block to the first: the last sees all keys and so overwrites all of dk and dv.
            for block in range((length - 1) // QUERY_BLOCK, -1, -1):
                first = block * QUERY_BLOCK
                last = min(first + QUERY_BLOCK, length)
                rows = last - first
                q_rows, do_rows = q + 4 * first * wide, dout + 4 * first * width
                gemm(False, True, rows, last, d, q_rows, wide, k, wide, 0, 0, 0, p_address, last, products)
                gemm(False, True, rows, last, d, do_rows, width, v, wide, 0, 0, 0, dp_address, last, products)
                for r in range(rows):
                    i = first + r
                    n = b * length + i
                    p = floats(p_address + 4 * r * last, last)
                    dp = floats(dp_address + 4 * r * last, last)
                    delta = dot(dout_NC[n, h * d : (h + 1) * d], out_NC[n, h * d : (h + 1) * d])
                    if threshold > 0:
                        dropout(dp[: i + 1], i * length, head_key, threshold, keep_scale)
                    _score_gradients(p.ctypes.data, dp.ctypes.data, i + 1, scale, lse_T[i], delta)
                    for j in range(i + 1, last):
                        p[j] = f4(0)
                        dp[j] = f4(0)
                    if threshold > 0:
                        dropout(p[: i + 1], i * length, head_key, threshold, keep_scale)
                old_dk, old_dv = (0, 0) if last == length else (dk, dv)
                dq_rows = dq + 4 * first * wide
                gemm(False, False, rows, d, last, dp_address, last, k, wide, 0, 0, 0, dq_rows, wide, products)
                gemm(True, False, last, d, rows, dp_address, last, q_rows, wide, old_dk, wide, 0, dk, wide, products)
                gemm(True, False, last, d, rows, p_address, last, do_rows, width, old_dv, wide, 0, dv, wide, products)
