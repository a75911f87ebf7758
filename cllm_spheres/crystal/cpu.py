"""What this CPU is and can do -> the backend of the matrix products in float32 and in bfloat16.

Both are functions of the CPU's features, of what Linux grants, and of three environment variables for tests and
comparisons. CLLM_SPHERES_CPU=avx2 takes this CPU for one that has no more than AVX2 (`LEVELS` has the other names):
numba then compiles for that CPU too. CLLM_SPHERES_GEMM=openblas leaves our own float32 tiles alone,
CLLM_SPHERES_BF16=avx512 leaves AMX alone and CLLM_SPHERES_BF16=none bfloat16 altogether. What comes of them is part of
the numerics fingerprint and of the name of the kernel cache.

`python -m cllm_spheres.crystal.cpu` prints the levels that this machine can be held to, its own last.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from itertools import takewhile
from typing import NamedTuple

import llvmlite.binding as llvm

from cllm_spheres.errors import InputError

CPU_VARIABLE, GEMM_VARIABLE, BF16_VARIABLE = "CLLM_SPHERES_CPU", "CLLM_SPHERES_GEMM", "CLLM_SPHERES_BF16"
_ARCH_REQ_XCOMP_PERM, _XTILEDATA, _SYS_ARCH_PRCTL = 0x1023, 18, 158


class Level(NamedTuple):
    """What a generation of CPUs can do more than the one before."""

    title: str
    needs: tuple[str, ...]  # features by which a CPU counts as one of this level
    cpu: str  # LLVM's name of such a CPU
    features: str  # all that it has more


LEVELS = {
    "sse4.2": Level("SSE4.2", ("sse4.2",), "nehalem",
                    "64bit cmov crc32 cx16 cx8 fxsr mmx popcnt sahf sse sse2 sse3 sse4.1 sse4.2 ssse3"),
    "avx2": Level("AVX2", ("avx2", "fma"), "haswell",
                  "aes avx avx2 bmi bmi2 f16c fma lzcnt movbe pclmul rdrnd xsave xsaveopt"),
    "avx512": Level("AVX-512", ("avx512f", "avx512bw", "avx512dq", "avx512vl"), "skylake-avx512",
                    "adx avx512bw avx512cd avx512dq avx512f avx512vl rdseed xsavec xsaves"),
    "avx512bf16": Level("AVX512-BF16", ("avx512bf16",), "cooperlake", "avx512bf16 avx512vnni"),
    "amx": Level("AMX", ("amx-tile", "amx-bf16"), "sapphirerapids", "amx-bf16 amx-int8 amx-tile"),
}  # fmt: skip


def levels() -> list[str]:
    """The levels that this CPU reaches by itself, the lowest first; none on other architectures than x86-64."""
    return list(takewhile(lambda level: all(_host().get(name) for name in LEVELS[level].needs), LEVELS))


def cap() -> str | None:
    """The level that CLLM_SPHERES_CPU holds this process to; None where it changes nothing. InputError for another."""
    if not os.environ.get(CPU_VARIABLE):
        return None
    own_first = levels()[::-1]
    if not own_first:
        raise InputError(f"{CPU_VARIABLE} is for x86-64 alone; this is {platform.machine()}. Leave it out.")
    wanted = _wanted(CPU_VARIABLE, own_first)
    return None if wanted == own_first[0] else wanted


@cache
def _host() -> dict[str, bool]:
    return dict(llvm.get_host_cpu_features())


@cache
def _held() -> tuple[str, dict[str, bool]]:
    """The name and the features of this CPU, or of the one that it is taken for."""
    level = cap()
    if level is None:
        return str(llvm.get_host_cpu_name()), _host()
    names = list(LEVELS)
    allowed = {name for below in names[: names.index(level) + 1] for name in LEVELS[below].features.split()}
    return LEVELS[level].cpu, {name: there and name in allowed for name, there in _host().items()}


def cpu_name() -> str:
    """LLVM's name of this CPU, such as sapphirerapids."""
    return _held()[0]


def cpu_features() -> str:
    """LLVM's list of what this CPU can do, as one string."""
    return ",".join(("+" if there else "-") + name for name, there in sorted(_held()[1].items()))


def has(*features: str) -> bool:
    """True where this CPU has all of these features, by LLVM's names such as avx512f."""
    return all(_held()[1].get(name) for name in features)


def request_amx() -> bool:
    """Ask Linux for the tile registers, once a process (children inherit it); False where there are none."""
    if platform.machine() != "x86_64" or not has("amx-tile", "amx-bf16"):
        return False
    return ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) == 0


def gemm_backend() -> str:
    """How this machine multiplies float32: "avx512" or "openblas". InputError for another, or one not had here."""
    return _wanted(GEMM_VARIABLE, ["avx512", "openblas"] if has(*LEVELS["avx512"].needs) else ["openblas"])


def bf16_backend() -> str | None:
    """How this machine multiplies bfloat16: "amx", "avx512" or, where it cannot, None.

    InputError for another; what is merely not had here is replaced by the next.
    """
    wanted = _wanted(BF16_VARIABLE, ["amx", "avx512", "none"])
    if wanted == "none" or not has("avx512bf16", "avx512bw", "avx512vl"):
        return None
    return "amx" if wanted == "amx" and request_amx() else "avx512"


def _wanted(variable: str, possible: list[str]) -> str:
    """What an environment variable asks for, the first where it does not. InputError where that is not possible."""
    wanted = os.environ.get(variable) or possible[0]
    if wanted not in possible:
        raise InputError(f"{variable}={wanted} is not possible here, only {', '.join(possible)}.")
    return wanted


if cap() is not None:  # before numba compiles anything; it reads these two then
    os.environ["NUMBA_CPU_NAME"], os.environ["NUMBA_CPU_FEATURES"] = cpu_name(), cpu_features()

if __name__ == "__main__":
    print(*levels(), sep="\n")
