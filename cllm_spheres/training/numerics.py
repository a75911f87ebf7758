"""What the bits of a run depend on besides its configuration: the numerics fingerprint, kept in state.json."""

from __future__ import annotations

import hashlib
from typing import Any

ARITHMETIC = 5  # raised whenever a change of ours changes bits


def fingerprint(dtype: str) -> dict[str, Any]:
    """Plain JSON; two equal ones promise equal bits for equal runs. dtype: what is computed in, "fp32" or "bf16"."""
    import llvmlite
    import numba

    from cllm_spheres.crystal import cpu
    from cllm_spheres.kernels import blas

    return {
        "arithmetic": ARITHMETIC,
        "dtype": dtype,
        "backend": cpu.bf16_backend() if dtype == "bf16" else cpu.gemm_backend(),
        "blas": blas.description(),
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "cpu": cpu.cpu_name(),
        "cpu_features": hashlib.sha256(cpu.cpu_features().encode()).hexdigest()[:16],
        "flush_to_zero": True,
    }
