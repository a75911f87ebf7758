"""Token and position embeddings. B sequences of T tokens, each padded to `padded` rows; N rows in all, C channels."""

from __future__ import annotations

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels.arrays import f4


@kernel
def embedding_forward(ids_BT, wte_VC, wpe_TC, length, padded, out_NC):
    """out = wte[id] + wpe[position], zero in padding rows; overwrites out. ids are flat and not padded."""
    for n in range(out_NC.shape[0]):
        position, out = n % padded, out_NC[n]
        if position < length:
            token, place = wte_VC[ids_BT[n // padded * length + position]], wpe_TC[position]
            for j in range(out.size):
                out[j] = token[j] + place[j]
        else:
            out[:] = f4(0)


@kernel
def embedding_backward(dout_NC, ids_BT, length, padded, dwte_VC, dwpe_TC, accumulate_wte, accumulate_wpe):
    """Adds to both; without `accumulate` all rows begin as zero. One of no rows is left out."""
    if not accumulate_wte:
        _clear(dwte_VC)
    if not accumulate_wpe:
        _clear(dwpe_TC)
    for n in range(dout_NC.shape[0]):
        dout, position = dout_NC[n], n % padded
        if position < length:
            if dwte_VC.shape[0] > 0:
                _add(dout, dwte_VC[ids_BT[n // padded * length + position]])
            if dwpe_TC.shape[0] > 0:
                _add(dout, dwpe_TC[position])


@kernel
def _clear(x_NC):
    for n in range(x_NC.shape[0]):
        x_NC[n][:] = f4(0)


@kernel
def _add(x, total):
    for j in range(x.size):
        total[j] += x[j]
