"""Token and position embeddings. B sequences of T tokens, N = B * T, C channels."""

from __future__ import annotations

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels.arrays import f4


@kernel
def embedding_forward(ids_N, wte_VC, wpe_TC, length, out_NC):
    """out[n] = wte[ids[n]] + wpe[n mod length]; overwrites out."""
    for n in range(ids_N.size):
        token, position, out = wte_VC[ids_N[n]], wpe_TC[n % length], out_NC[n]
        for j in range(out.size):
            out[j] = token[j] + position[j]


@kernel
def embedding_backward(dout_NC, ids_N, length, dwte_VC, dwpe_TC, accumulate_wte, accumulate_wpe):
    """Adds to both; without `accumulate` all rows begin as zero. One of no rows is left out."""
    if not accumulate_wte:
        _clear(dwte_VC)
    if not accumulate_wpe:
        _clear(dwpe_TC)
    for n in range(ids_N.size):
        dout = dout_NC[n]
        if dwte_VC.shape[0] > 0:
            _add(dout, dwte_VC[ids_N[n]])
        if dwpe_TC.shape[0] > 0:
            _add(dout, dwpe_TC[n % length])


@kernel
def _clear(x_NC):
    for n in range(x_NC.shape[0]):
        x_NC[n][:] = f4(0)


@kernel
def _add(x, total):
    for j in range(x.size):
        total[j] += x[j]
