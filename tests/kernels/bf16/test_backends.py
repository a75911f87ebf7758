"""AMX and AVX-512 side by side on one machine: the same promises, and no machine code in common."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.bf16.twins import BACKEND

ROOT = Path(__file__).parents[3]
# A product of 32 x 32 ones, which ends the process where the backend's instructions are not to be had.
PRODUCT = """
import numpy as np
from cllm_spheres.kernels.bf16.linear import multiply
from cllm_spheres.kernels.bf16.multiply import BACKEND, begin, end
ones, out, scratch = np.full(1024, 0x3F80, np.uint16), np.zeros((32, 32), np.float32), np.zeros(1024, np.float32)
begin(scratch.ctypes.data)
multiply.call(32, 32, 32, ones.ctypes.data, ones.ctypes.data, 1024, out.ctypes.data, 0, scratch.ctypes.data)
end()
assert (out == 32).all()
print(BACKEND)
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BACKEND != "amx", reason="no AMX: the other tests here ran on AVX-512 as it is"),
]


def run(backend, *words, **environment):
    """Python in a process of its own, with the backend that is named."""
    environment = os.environ | {"CLLM_SPHERES_BF16": backend, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *words], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_all_that_is_promised_here_holds_on_avx512_too():
    tests = sorted(str(path) for path in Path(__file__).parent.glob("test_*.py") if path.name != Path(__file__).name)
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    done = run("avx512", "-m", "pytest", *options, *tests)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout


def test_a_cache_that_both_backends_have_filled_serves_each_its_own(tmp_path):
    for backend in ("amx", "avx512", "amx"):
        done = run(backend, "-c", PRODUCT, XDG_CACHE_HOME=str(tmp_path))
        assert (done.returncode, done.stdout) == (0, f"{backend}\n"), done.stderr[-1000:]
