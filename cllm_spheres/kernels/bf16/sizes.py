"""Sizes that the layout of memory and the bfloat16 kernels share, and what this CPU multiplies bfloat16 with."""

from __future__ import annotations

import ctypes
import os
import platform

import llvmlite.binding as llvm

from cllm_spheres.crystal.jit import BF16_VARIABLE

SWEEP = 256  # columns of a product that are finished together: 32 rows of them, 32 KB, stay in L1
CHUNK = 1024  # columns of the vocabulary that the head looks at together
_ARCH_REQ_XCOMP_PERM, _XTILEDATA, _SYS_ARCH_PRCTL = 0x1023, 18, 158


def padded(n: int) -> int:
    """n raised to a multiple of 32."""
    return -(-n // 32) * 32


def attention_bytes(t: int, e: int) -> int:
    """Bytes of scratch for the attention of sequences of t tokens and heads of e columns, both padded."""
    scores, lines, squares, strips, result = 32 * t * 4, 32 * t * 2, t * t * 2, t * e * 2, 32 * e * 4
    return 2 * (scores + lines + squares) + 5 * strips + result + 256


def request_amx() -> bool:
    """Ask Linux for the tile registers, once a process (children inherit it); False where there are none."""
    features = llvm.get_host_cpu_features()
    if platform.machine() != "x86_64" or not (features.get("amx-tile") and features.get("amx-bf16")):
        return False
    return ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) == 0


def bf16_backend() -> str | None:
    """How this machine multiplies bfloat16: "amx", "avx512" or, where it cannot, None.

    CLLM_SPHERES_BF16=avx512 leaves AMX alone, CLLM_SPHERES_BF16=none both: for tests and comparisons.
    """
    wanted = os.environ.get(BF16_VARIABLE) or "amx"
    features = llvm.get_host_cpu_features()
    if wanted == "none" or not all(features.get(name) for name in ("avx512bf16", "avx512bw", "avx512vl")):
        return None
    return "amx" if wanted == "amx" and request_amx() else "avx512"
