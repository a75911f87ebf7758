"""The cache of machine code: a change in any source that is compiled must never run old code."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys

import pytest

from cllm_spheres.crystal.jit import COMPILED, PACKAGE

GELU = """
import numpy as np
import cllm_spheres.crystal.jit as jit
from cllm_spheres.kernels.gelu import gelu_forward
out = np.empty(3, np.float32)
gelu_forward(np.array([-1, 0.5, 1], np.float32), out)
print(jit.__file__, jit.CACHE_FOLDER, out.tolist(), sum(gelu_forward.stats.cache_hits.values()), sep="|")
"""
LEAVES_NUMBA_ALONE = """
import numba
before = numba.config.CACHE_DIR
import cllm_spheres.kernels.gelu
assert numba.config.CACHE_DIR == before, numba.config.CACHE_DIR
@numba.njit(cache=True)
def mine(x):
    return x
print(before, mine._cache.cache_path, sep="|")
"""


def run(code, tree, **environment):
    """What the code prints, split at |, in a process of its own that imports the package from `tree`."""
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"} | environment
    script = tree / "script.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script], cwd=tree, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("|")


@pytest.fixture
def tree(tmp_path):
    """A copy of the package."""
    shutil.copytree(PACKAGE, tmp_path / "cllm_spheres", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_editing_a_helper_changes_the_result_of_the_kernels_that_use_it(tree):
    cache = str(tree / "cache")
    file, folder, first, hits = run(GELU, tree, XDG_CACHE_HOME=cache)
    assert file.startswith(str(tree)) and folder.startswith(cache) and hits == "0"
    assert run(GELU, tree, XDG_CACHE_HOME=cache) == [file, folder, first, "1"]
    helper = tree / "cllm_spheres" / "crystal" / "functions" / "training.py"
    source = helper.read_text()
    assert source.count("f4(5.0000001201e-1)") == 1  # a coefficient of exp, which gelu.py only imports
    helper.write_text(source.replace("f4(5.0000001201e-1)", "f4(0.75)"))
    _, other_folder, second, hits = run(GELU, tree, XDG_CACHE_HOME=cache)
    assert other_folder != folder and second != first and hits == "0"
    helper.write_text(source)
    assert run(GELU, tree, XDG_CACHE_HOME=cache) == [file, folder, first, "1"]


def test_the_users_own_numba_cache_is_left_alone(tree):
    theirs = str(tree / "theirs")
    before, path = run(LEAVES_NUMBA_ALONE, tree, NUMBA_CACHE_DIR=theirs, XDG_CACHE_HOME=str(tree / "cache"))
    assert before == theirs and path.startswith(theirs)


def test_a_cache_folder_that_cannot_be_written_is_replaced(tree):
    (tree / "file").write_text("")
    _, folder, _, _ = run(GELU, tree, XDG_CACHE_HOME=str(tree / "file"), TMPDIR=str(tree))
    assert folder.startswith(str(tree / "cllm-spheres-"))


def test_all_jitted_code_lies_in_the_folders_that_the_cache_knows():
    compiled = {"kernel", "reduction", "element", "entry", "intrinsic", "njit", "jit", "cfunc"}
    for path in PACKAGE.rglob("*.py"):
        nodes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom))
        froms = [node for node in nodes if (node.module or "").startswith(("numba", "cllm_spheres.crystal.jit"))]
        if compiled & {alias.name for node in froms for alias in node.names}:
            inside = path.relative_to(PACKAGE)
            assert any(inside.match(pattern) for pattern in COMPILED), f"{inside} is compiled"
