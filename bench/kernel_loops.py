"""A float32 kernel and its arguments -> the same call many times, in jitted code: the way in costs nothing.

Every loop takes `times` first. Addresses are int64; shapes as in the kernels. Subnormals are flushed, as in training.
"""

from __future__ import annotations

from cllm_spheres.crystal.jit import kernel, reduction
from cllm_spheres.kernels.arrays import f4
from cllm_spheres.kernels.attention import attention_backward, attention_forward
from cllm_spheres.kernels.blas import blas_gemm
from cllm_spheres.kernels.cross_entropy import head_loss_backward, softmax_cross_entropy
from cllm_spheres.kernels.fpu import flush_subnormals, restore
from cllm_spheres.kernels.gather import gather_block
from cllm_spheres.kernels.gelu import gelu_backward, gelu_forward
from cllm_spheres.kernels.layernorm import layernorm_backward, layernorm_forward
from cllm_spheres.kernels.optimizer import ADAMW, commit_block, update_block
from cllm_spheres.kernels.products import gemm
from cllm_spheres.kernels.sizes import BLOCK

_gather_block, _update_block, _commit_block = gather_block.external, update_block.external, commit_block.external


@kernel
def repeat_gemm(times, ta, tb, m, n, k, a, lda, b, ldb, c, ldc, scratch):
    """The float32 product of this CPU."""
    state = flush_subnormals()
    for _ in range(times):
        gemm(ta, tb, m, n, k, a, lda, b, ldb, 0, 0, 0, c, ldc, scratch)
    restore(state)


@kernel
def repeat_openblas(times, ta, tb, m, n, k, a, lda, b, ldb, c, ldc):
    """The same by OpenBLAS."""
    state = flush_subnormals()
    for _ in range(times):
        blas_gemm(ta, tb, m, n, k, a, lda, b, ldb, 0, c, ldc)
    restore(state)


@kernel
def repeat_layernorm_forward(times, x_NC, gain_C, bias_C, out_NC, mean_N, rstd_N):
    """Layer normalisation."""
    state = flush_subnormals()
    for _ in range(times):
        layernorm_forward(x_NC, gain_C, bias_C, out_NC, mean_N, rstd_N)
    restore(state)


@kernel
def repeat_layernorm_backward(times, dout_NC, x_NC, gain_C, mean_N, rstd_N, dx_NC, dgain_C, dbias_C):
    """Its gradients; dx grows with every call."""
    state = flush_subnormals()
    for _ in range(times):
        layernorm_backward(dout_NC, x_NC, gain_C, mean_N, rstd_N, dx_NC, dgain_C, dbias_C, False)
    restore(state)


@kernel
def repeat_gelu_forward(times, x_N, out_N):
    """GELU."""
    state = flush_subnormals()
    for _ in range(times):
        gelu_forward(x_N, out_N)
    restore(state)


@kernel
def repeat_gelu_backward(times, x_N, dout_N):
    """Its gradient, in place: x where the slope is 1 leaves dout as it is."""
    state = flush_subnormals()
    for _ in range(times):
        gelu_backward(x_N, dout_N)
    restore(state)


@kernel
def repeat_softmax(times, logits_RV, targets_R, scale):
    """Softmax, cross-entropy and their gradient, in place."""
    state = flush_subnormals()
    total = 0.0
    for _ in range(times):
        total += softmax_cross_entropy(logits_RV, targets_R, scale, 0)[0]
    restore(state)
    return total


@kernel
def repeat_head(times, x_NC, wte_VC, targets_N, scale, logits_RV, dx_NC, dwte_VC, scratch):
    """The whole head, forward and backward; the last loss."""
    state = flush_subnormals()
    loss = 0.0
    for _ in range(times):
        loss = head_loss_backward(
            x_NC, wte_VC, targets_N, scale, 0, logits_RV, dx_NC.ctypes.data, dwte_VC.ctypes.data, False, scratch
        )[0]
    restore(state)
    return loss


@kernel
def repeat_attention_forward(times, qkv_N3C, length, heads, scratch, out_NC, lse_BHT, keep_scale):
    """Causal attention without dropout."""
    state = flush_subnormals()
    for _ in range(times):
        attention_forward(qkv_N3C, length, heads, 0, 0, 0, keep_scale, scratch, out_NC, lse_BHT)
    restore(state)


@kernel
def repeat_attention_backward(times, dout_NC, qkv_N3C, out_NC, lse_BHT, length, heads, scratch, dqkv_N3C, keep_scale):
    """Its gradients."""
    state = flush_subnormals()
    for _ in range(times):
        attention_backward(
            dout_NC, qkv_N3C, out_NC, lse_BHT, length, heads, 0, 0, 0, keep_scale, scratch, dqkv_N3C
        )  # fmt: skip
    restore(state)


@kernel
def repeat_gather(times, segments, stride, num_segments, out, norms, num_blocks):
    """Every block's sum over the segments and its norm; out: room for one block."""
    for _ in range(times):
        for block in range(num_blocks):
            _gather_block(segments, stride, num_segments, out, norms, block)


@kernel
def repeat_update(times, decision, gradient, params, moments, squares, slot, num_blocks):
    """AdamW on every block, through the slot."""
    for _ in range(times):
        for block in range(num_blocks):
            _update_block(ADAMW, decision, gradient + 4 * block * BLOCK, params, moments, squares, slot, block, 1)
            _commit_block(ADAMW, params, moments, squares, slot, block)


@reduction
def read_floats(x_N):
    """The sum of a large buffer: what memory gives."""
    total = f4(0)
    for i in range(x_N.size):
        total += x_N[i]
    return total
