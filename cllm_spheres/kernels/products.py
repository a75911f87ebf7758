"""The float32 matrix product of this CPU: our own AVX-512 tiles, elsewhere OpenBLAS.

The choice is a function of the CPU's features alone; CLLM_SPHERES_GEMM=openblas forces OpenBLAS, which is part of the
numerics fingerprint and of the name of the kernel cache.
"""

from __future__ import annotations

import os

import llvmlite.binding as llvm

from cllm_spheres.crystal.jit import GEMM_VARIABLE, kernel
from cllm_spheres.kernels.arrays import f4, floats
from cllm_spheres.kernels.blas import blas_gemm


def gemm_backend() -> str:
    """ "avx512" or "openblas". ValueError for a CLLM_SPHERES_GEMM that this CPU or this version does not know."""
    features = llvm.get_host_cpu_features()
    has_vectors = all(features.get(name) for name in ("avx512f", "avx512bw", "avx512dq", "avx512vl"))
    known = ("avx512", "openblas") if has_vectors else ("openblas",)
    wanted = os.environ.get(GEMM_VARIABLE) or known[0]
    if wanted not in known:
        raise ValueError(f"{GEMM_VARIABLE}={wanted} is not possible here, only {' and '.join(known)}")
    return wanted


@kernel
def openblas_gemm(transpose_a, transpose_b, m, n, k, a, lda, b, ldb, start, ld_start, bias, c, ldc, scratch):
    """`gemm` by OpenBLAS: what is added is laid down first. It needs no scratch."""
    if (start != 0 and start != c) or bias != 0:
        for i in range(m):
            row = floats(c + 4 * i * ldc, n)
            if start != 0:
                old = floats(start + 4 * i * ld_start, n)
                for j in range(n):
                    row[j] = old[j]
            else:
                row[:] = f4(0)
            if bias != 0:
                added = floats(bias, n)
                for j in range(n):
                    row[j] += added[j]
    beta = f4(1) if start != 0 or bias != 0 else f4(0)
    blas_gemm(transpose_a, transpose_b, m, n, k, a, lda, b, ldb, beta, c, ldc)


BACKEND = gemm_backend()

if BACKEND == "avx512":
    from cllm_spheres.kernels.sgemm import tiled_sgemm

    _tiled_sgemm = tiled_sgemm.external

    @kernel
    def gemm(transpose_a, transpose_b, m, n, k, a, lda, b, ldb, start, ld_start, bias, c, ldc, scratch):
        """C[m, n] = start[m, n] + bias[n] + op(A)[m, k] op(B)[k, n]; overwrites C, which may be start.

        a, b, c: addresses; ld*: floats from row to row; start and bias: addresses or 0 for none. What stood in C does
        not matter, NaN neither, but where C is start. scratch: `product_floats` floats.
        """
        _tiled_sgemm(transpose_a, transpose_b, m, n, k, a, lda, b, ldb, start, ld_start, bias, c, ldc, scratch)

else:
    gemm = openblas_gemm
