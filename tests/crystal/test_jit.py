"""The cache of machine code: a change in any source that is compiled must never run old code."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys

import pytest
from numba import types
from numba.core.registry import cpu_target

from cllm_spheres.crystal import jit
from cllm_spheres.crystal.jit import COMPILED, PACKAGE

GELU = """
import numpy as np
import cllm_spheres.crystal.jit as jit
said = []
jit.announce = said.append
from cllm_spheres.kernels.gelu import gelu_forward
out = np.empty(3, np.float32)
gelu_forward(np.array([-1, 0.5, 1], np.float32), out)
hits = sum(gelu_forward.stats.cache_hits.values())
print(jit.__file__, jit.CACHE_FOLDER, out.tolist(), hits, jit.COMPILING in said, sep="|")
"""
OTHERS_KERNEL = """
from cllm_spheres.crystal.jit import kernel
SUMMAND = NUMBER
@kernel
def plus(x):
    return x + SUMMAND
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


def test_editing_a_helper_changes_the_result_of_the_kernels_that_use_it_and_compiling_is_told(tree):
    cache = str(tree / "cache")
    file, folder, first, *rest = run(GELU, tree, XDG_CACHE_HOME=cache)
    assert file.startswith(str(tree)) and folder.startswith(cache) and rest == ["0", "True"]
    warm = [file, folder, first, "1", "False"]
    assert run(GELU, tree, XDG_CACHE_HOME=cache) == warm
    helper = tree / "cllm_spheres" / "crystal" / "functions" / "exponential.py"
    source = helper.read_text()
    assert source.count("f4(0.49999994)") == 1  # a coefficient of exp, which gelu.py only imports
    helper.write_text(source.replace("f4(0.49999994)", "f4(0.75)"))
    _, other_folder, second, *rest = run(GELU, tree, XDG_CACHE_HOME=cache)
    assert other_folder != folder and second != first and rest == ["0", "True"]
    helper.write_text(source)
    assert run(GELU, tree, XDG_CACHE_HOME=cache) == warm
    # Another installation, at another path, with other times of its files, finds what this one has compiled.
    shutil.copytree(tree / "cllm_spheres", tree / "elsewhere" / "cllm_spheres")
    for path in (tree / "elsewhere").rglob("*.py"):
        os.utime(path, (1, 1))
    elsewhere, *same = run(GELU, tree / "elsewhere", XDG_CACHE_HOME=cache)
    assert elsewhere.startswith(str(tree / "elsewhere")) and same == warm[1:]


def test_a_kernel_of_another_file_is_compiled_again_when_its_file_changes(tree):
    code, results = "import mine; print(mine.plus(1), sum(mine.plus.stats.cache_hits.values()), sep='|')", []
    for number in (1, 2, 2):
        (tree / "mine.py").write_text(OTHERS_KERNEL.replace("NUMBER", str(number)))
        results.append(run(code, tree, XDG_CACHE_HOME=str(tree / "cache")))
    assert results == [["2", "0"], ["3", "0"], ["3", "1"]]


def test_a_process_says_once_what_it_compiles_and_again_after_a_pause(monkeypatch):
    said = []
    monkeypatch.setattr(jit, "announce", said.append)
    monkeypatch.setattr(jit, "_last_compiled", float("-inf"))
    first, second = (jit._Cache(function) for function in (run, lambda: 1))
    for cache in (first, second):
        cache.disable()
        assert cache.load_overload(None, cpu_target.target_context) is None
    assert said == [jit.COMPILING]
    monkeypatch.setattr(jit, "_last_compiled", jit._last_compiled - jit.TELL_AFTER_S - 1)
    first.load_overload(None, cpu_target.target_context)
    assert len(said) == 2


def test_the_users_own_numba_cache_is_left_alone(tree):
    theirs = str(tree / "theirs")
    before, path = run(LEAVES_NUMBA_ALONE, tree, NUMBA_CACHE_DIR=theirs, XDG_CACHE_HOME=str(tree / "cache"))
    assert before == theirs and path.startswith(theirs)


def test_a_cache_folder_that_cannot_be_written_is_replaced(tree):
    (tree / "file").write_text("")
    _, folder, *_ = run(GELU, tree, XDG_CACHE_HOME=str(tree / "file"), TMPDIR=str(tree))
    assert folder.startswith(str(tree / "cllm-spheres-"))


def test_all_jitted_code_lies_in_the_folders_that_the_cache_knows():
    compiled = {"kernel", "reduction", "element", "entry", "op", "intrinsic", "njit", "jit", "cfunc"}
    for path in PACKAGE.rglob("*.py"):
        nodes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom))
        froms = [
            node
            for node in nodes
            if (node.module or "").startswith(("numba", "cllm_spheres.crystal.jit", "cllm_spheres.model.record"))
        ]
        if compiled & {alias.name for node in froms for alias in node.names}:
            inside = path.relative_to(PACKAGE)
            assert any(inside.match(pattern) for pattern in COMPILED), f"{inside} is compiled"


def foreign_names(source, is_compiled):
    """Names of this package that jitted code of a module reads, and that come from modules which the cache ignores."""
    tree = ast.parse(source)
    foreign = {
        alias.asname or alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cllm_spheres")
        for alias in node.names
        if not (is_compiled(f"{node.module}.{alias.name}") or is_compiled(node.module))
    }
    jitted = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.decorator_list]
    names = {n.id for function in jitted for part in function.body for n in ast.walk(part) if isinstance(n, ast.Name)}
    return {name: module for name, module in foreign.items() if name in names}


def test_jitted_code_takes_in_no_constant_that_the_cache_does_not_know():
    files = [path for pattern in COMPILED for path in PACKAGE.glob(pattern)]
    known = {".".join(("cllm_spheres", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in files}
    for path in files:
        if path != PACKAGE / "crystal/jit.py":
            assert foreign_names(path.read_text(), known.__contains__) == {}, path
    rule = "from cllm_spheres.model.rules.bf16 import PADDING\n@op\ndef f(record, registers):\n    return PADDING\n"
    assert foreign_names(rule, known.__contains__) == {"PADDING": "cllm_spheres.model.rules.bf16"}


def test_a_second_entry_of_one_name_is_an_error_and_not_a_replacement():
    """Jitted code finds entries by their symbols."""
    signature = types.int64(types.int64)

    def twice(x):
        return 2 * x

    first = jit.entry(signature)(twice)
    with pytest.raises(ValueError, match=r"there are two entries tests_crystal_test_jit_test_a_second_entry.*twice"):
        jit.entry(signature)(twice)
    assert first.call(4) == 8
