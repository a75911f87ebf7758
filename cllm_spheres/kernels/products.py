"""The float32 matrix product of this CPU: our own AVX-512 tiles, elsewhere OpenBLAS.

The choice is a function of the CPU's features alone (`crystal/cpu.py`).
"""

from __future__ import annotations

from cllm_spheres.crystal.cpu import gemm_backend
from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels.arrays import f4, floats
from cllm_spheres.kernels.blas import blas_gemm


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
