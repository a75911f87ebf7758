"""What this CPU is and can do -> the backend of the matrix products in float32 and in bfloat16.

Both are functions of the CPU's features, of what Linux grants, and of two environment variables for tests and
comparisons: CLLM_SPHERES_GEMM=openblas leaves our own float32 tiles alone, CLLM_SPHERES_BF16=avx512 leaves AMX alone
and CLLM_SPHERES_BF16=none bfloat16 altogether. What comes of them is part of the numerics fingerprint and of the name
of the kernel cache.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

import llvmlite.binding as llvm

GEMM_VARIABLE, BF16_VARIABLE = "CLLM_SPHERES_GEMM", "CLLM_SPHERES_BF16"
_ARCH_REQ_XCOMP_PERM, _XTILEDATA, _SYS_ARCH_PRCTL = 0x1023, 18, 158


def cpu_name() -> str:
    """LLVM's name of this CPU, such as sapphirerapids."""
    return str(llvm.get_host_cpu_name())


def cpu_features() -> str:
    """LLVM's list of what this CPU can do, as one string."""
    return str(llvm.get_host_cpu_features().flatten())


@cache
def _features() -> dict[str, bool]:
    return dict(llvm.get_host_cpu_features())


def has(*features: str) -> bool:
    """True where this CPU has all of these features, by LLVM's names such as avx512f."""
    return all(_features().get(name) for name in features)


def request_amx() -> bool:
    """Ask Linux for the tile registers, once a process (children inherit it); False where there are none."""
    if platform.machine() != "x86_64" or not has("amx-tile", "amx-bf16"):
        return False
    return ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) == 0


def gemm_backend() -> str:
    """How this machine multiplies float32: "avx512" or "openblas". ValueError for another, or one not had here."""
    known = ("avx512", "openblas") if has("avx512f", "avx512bw", "avx512dq", "avx512vl") else ("openblas",)
    wanted = os.environ.get(GEMM_VARIABLE) or known[0]
    if wanted not in known:
        raise ValueError(f"{GEMM_VARIABLE}={wanted} is not possible here, only {' and '.join(known)}")
    return wanted


def bf16_backend() -> str | None:
    """How this machine multiplies bfloat16: "amx", "avx512" or, where it cannot, None."""
    wanted = os.environ.get(BF16_VARIABLE) or "amx"
    if wanted == "none" or not has("avx512bf16", "avx512bw", "avx512vl"):
        return None
    return "amx" if wanted == "amx" and request_amx() else "avx512"
