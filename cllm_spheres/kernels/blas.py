"""Row-major float32 matrix products by OpenBLAS, one thread, called from jitted code.

The wheel `scipy-openblas32` brings the library. It is loaded with one thread whatever the environment says: the
spheres are the parallelism. A symbol that is missing is an error here, at import: a cached call to it would end
the process without a word.
"""

from __future__ import annotations

import ctypes
import os

import llvmlite.binding as llvm
import numpy as np
from numba import types

from cllm_spheres.crystal.cpu import has
from cllm_spheres.crystal.jit import kernel

f4 = np.float32
_ROW_MAJOR, _PLAIN, _TRANSPOSED = np.int32(101), np.int32(111), np.int32(112)
_i32, _f32, _address = types.int32, types.float32, types.intp


# OpenBLAS's names for its kernels, the widest vectors first, and what a CPU needs for them.
_CORE_TYPES = {
    "SkylakeX": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"),
    "Haswell": ("avx2", "fma"),
    "Sandybridge": ("avx",),
    "Nehalem": ("sse4.2",),
}


def _core_type() -> str | None:
    """OpenBLAS's name for the kernels that fit this CPU's vectors; None leaves the choice to OpenBLAS."""
    return next((name for name, needed in _CORE_TYPES.items() if has(*needed)), None)


def _load() -> ctypes.CDLL:
    # Read once, while the library loads. One thread: no idle ones are started. The core type: the same kernels on
    # every CPU with the same vector width, so that a run's bits survive a move between them; the user's own wins.
    wanted = {"OPENBLAS_NUM_THREADS": "1"}
    if (core := _core_type()) and "OPENBLAS_CORETYPE" not in os.environ:
        wanted["OPENBLAS_CORETYPE"] = core
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        import scipy_openblas32  # some versions load the library here, others leave that to us

        folder, name = scipy_openblas32.get_lib_dir(), scipy_openblas32.get_library()
        library = ctypes.CDLL(os.path.join(folder, f"lib{name}.so"))
    finally:
        for variable, value in before.items():
            if value is None:
                del os.environ[variable]
            else:
                os.environ[variable] = value
    library.scipy_openblas_set_num_threads(1)
    llvm.add_symbol("cllm_spheres_sgemm", ctypes.cast(library.scipy_cblas_sgemm, ctypes.c_void_p).value)
    return library


_library = _load()
_sgemm = types.ExternalFunction(
    "cllm_spheres_sgemm",
    types.void(_i32, _i32, _i32, _i32, _i32, _i32, _f32, _address, _i32, _address, _i32, _f32, _address, _i32),
)


def description() -> str:
    """OpenBLAS's version and the CPU core it chose its kernels for."""
    version = _library.scipy_openblas_get_config
    core = _library.scipy_openblas_get_corename
    version.restype = core.restype = ctypes.c_char_p
    return f"{version().decode().split()[1]} {core().decode()}"


@kernel
def blas_gemm(transpose_a, transpose_b, m, n, k, a, lda, b, ldb, beta, c, ldc):
    """C[m, n] = op(A)[m, k] op(B)[k, n] + beta C. a, b, c: addresses; ld*: floats from row to row.

    With beta 0 what stood in C does not matter, NaN neither.
    """
    _sgemm(
        _ROW_MAJOR, _TRANSPOSED if transpose_a else _PLAIN, _TRANSPOSED if transpose_b else _PLAIN,
        np.int32(m), np.int32(n), np.int32(k), f4(1), a, np.int32(lda), b, np.int32(ldb), f4(beta), c, np.int32(ldc),
    )  # fmt: skip
