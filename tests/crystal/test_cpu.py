"""What this CPU is taken for: the levels, the variable that holds it to one of them, and who hears of it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cllm_spheres.crystal import cpu
from cllm_spheres.errors import InputError
from tests.runs import command

# A loop that fills the widest vectors there are; what numba and OpenBLAS compute with; what was known to be there.
HELD = """
import numpy as np
from cllm_spheres.crystal import cpu
from cllm_spheres.kernels import blas
from cllm_spheres.kernels.gelu import gelu_forward
gelu_forward(np.ones(64, np.float32), np.empty(64, np.float32))
(code,) = gelu_forward.inspect_asm().values()
print(cpu.cpu_name(), blas.description().split()[-1], "zmm" in code, "ymm" in code, *map(cpu.has, ("avx512f", "avx2")))
"""


@pytest.fixture
def held_to(monkeypatch):
    """held_to(level): what the module says of this CPU then. Its answers are forgotten again."""

    def hold(level):
        monkeypatch.setenv("CLLM_SPHERES_CPU", level)
        cpu._held.cache_clear()

    yield hold
    monkeypatch.undo()
    cpu._held.cache_clear()


@pytest.mark.parametrize("level", cpu.levels())
def test_a_cpu_can_be_held_to_each_level_that_it_reaches(held_to, level):
    held_to("")
    own = cpu.cpu_name(), cpu.cpu_features()
    held_to(level)
    reached = cpu.levels()[: cpu.levels().index(level) + 1]
    assert [name for name, which in cpu.LEVELS.items() if cpu.has(*which.needs)] == reached
    assert ((cpu.cpu_name(), cpu.cpu_features()) == own) == (level == cpu.levels()[-1])
    assert cpu.gemm_backend() == ("avx512" if "avx512" in reached else "openblas")
    assert (cpu.bf16_backend() is not None) == ("avx512bf16" in reached)


@pytest.mark.skipif("avx2" not in cpu.levels()[:-1], reason="this CPU has nothing above AVX2 to leave alone")
def test_numba_and_openblas_compute_with_what_the_level_has(tmp_path):
    # A cache of its own: of a kernel that comes from a cache numba does not show the code.
    environment = os.environ | {"CLLM_SPHERES_CPU": "avx2", "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("OPENBLAS_CORETYPE", None)
    done = subprocess.run([sys.executable, "-c", HELD], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "haswell Haswell False True False True\n", done.stdout + done.stderr[-1000:]


@pytest.mark.parametrize("variable", ["CLLM_SPHERES_CPU", "CLLM_SPHERES_GEMM", "CLLM_SPHERES_BF16"])
def test_what_is_not_possible_is_an_error_that_names_what_is(monkeypatch, variable):
    monkeypatch.setenv(variable, "abacus")
    with pytest.raises(InputError, match=f"{variable}(=abacus is not possible here, only | is for x86-64 alone)"):
        cpu.cap(), cpu.gemm_backend(), cpu.bf16_backend()


def test_a_training_on_an_impossible_cpu_is_refused_in_words(tmp_path):
    done = command("train", "--run", tmp_path / "run", env=os.environ | {"CLLM_SPHERES_CPU": "z80"})
    assert done.returncode == 2 and done.stderr.startswith("InputError: CLLM_SPHERES_CPU")
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()
