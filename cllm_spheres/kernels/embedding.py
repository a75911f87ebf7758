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
def embedding_backward(dout_NC, ids_N, length, dwte_VC, dwpe_TC, accumulate):
    """Adds to dwte (which the head has written before); dwpe: `accumulate` false overwrites all its rows."""
    if not accumulate:
        for t in range(dwpe_TC.shape[0]):
            dwpe_TC[t][:] = f4(0)
    for n in range(ids_N.size):
        dout, dtoken, dposition = dout_NC[n], dwte_VC[ids_N[n]], dwpe_TC[n % length]
        for j in range(dout.size):
            dtoken[j] += dout[j]
        for j in range(dout.size):
            dposition[j] += dout[j]
