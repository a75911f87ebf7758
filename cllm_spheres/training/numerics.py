"""What the bits of a run depend on besides its configuration: the numerics fingerprint, kept in state.json."""

from __future__ import annotations

import hashlib
from typing import Any

ARITHMETIC = 1  # raised whenever a change of ours changes bits


def fingerprint() -> dict[str, Any]:
    """Plain JSON; two equal fingerprints promise equal bits for equal runs."""
    import llvmlite
    import numba

    from cllm_spheres.crystal import jit
    from cllm_spheres.kernels import blas

    return {
        "arithmetic": ARITHMETIC,
        "dtype": "fp32",
        "backend": "openblas",
        "blas": blas.description(),
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "cpu": jit.cpu_name(),
        "cpu_features": hashlib.sha256(jit.cpu_features().encode()).hexdigest()[:16],
        "flush_to_zero": True,
    }
