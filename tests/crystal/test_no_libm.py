"""No machine code of ours calls the C library's mathematics: read from the symbols of what numba's cache holds."""

from __future__ import annotations

import importlib
import math
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
from numba.core import caching

import cllm_spheres
from cllm_spheres.crystal import lattice, primes, soft_targets, ulam
from cllm_spheres.crystal.cpu import bf16_backend, has
from cllm_spheres.crystal.functions import elementwise
from cllm_spheres.crystal.jit import CACHE_FOLDER, PACKAGE, Entry, kernel
from tests.crystal.symbols import undefined

HERE = Path(__file__)
# What compiled code may take from elsewhere, and nothing else: Python, numba, memory, the system, our entries
ALLOWED = re.compile(
    r"_?Py\w+|NRT_\w+|numba_(?:gil_ensure|gil_release|do_raise|unpickle|runtime_build_excinfo_struct"
    r"|attempt_nocopy_reshape)|mem(?:set|cpy|move|cmp)|syscall|clock_gettime|sleep|kill|getpid|cllm_spheres_\w+"
    + ("" if has("fma") else "|fmaf?")  # which has one right answer, also where the library computes it
)

HAS_BF16 = bf16_backend() is not None


def taken(folder, name=""):
    """File -> the names it takes that are not allowed, of every function in a folder of numba's cache."""
    found = {}
    for path in sorted(folder.glob(f"{name}*.nbc")):
        content = path.read_bytes()
        start = content.find(b"\x7fELF")
        assert start >= 0, f"{path.name} has no machine code"
        found[path.name] = {each for each in undefined(content[start:]) if not ALLOWED.fullmatch(each)}
    return found


def folder_of(source):
    """Where machine code from a source file lies: by the module's name, or of other files by numba's name."""
    if source.is_relative_to(PACKAGE):
        return CACHE_FOLDER / ".".join(source.relative_to(PACKAGE).with_suffix("").parts)
    return CACHE_FOLDER / caching._CacheLocator.get_suitable_cache_subpath(str(source))


def modules():
    """All modules of the package; those that need what is not installed, or a CPU that is not here, are left out."""
    for found in pkgutil.walk_packages(cllm_spheres.__path__, "cllm_spheres."):
        if not HAS_BF16 and ("bf16" in found.name or found.name.endswith(".packing")):
            continue  # LLVM ends the process where it meets an instruction that the CPU lacks
        try:
            yield importlib.import_module(found.name)
        except ImportError as error:
            assert not (error.name or "").startswith("cllm_spheres"), error


@kernel
def tanh_of_numpy(x):
    return np.tanh(x)


@kernel
def erf_of_the_library(x):
    return math.erf(x)


@kernel
def power_of_python(x, y):
    return x**y


@kernel
def remainder_of_numpy(x, y):
    return np.fmod(x, y)


@kernel
def root_and_rounding(x):
    return math.sqrt(x) + abs(x) + np.floor(x)


@pytest.mark.parametrize(
    ("function", "arguments", "symbol"),
    [
        (tanh_of_numpy, (0.5,), "tanh"), (tanh_of_numpy, (np.float32(0.5),), "tanhf"),
        (erf_of_the_library, (0.5,), "erf"), (power_of_python, (2.0, 0.3), "pow"),
        (power_of_python, (np.float32(2), np.float32(0.3)), "powf"), (remainder_of_numpy, (2.0, 0.3), "fmod"),
    ],
)  # fmt: skip
def test_a_call_of_the_library_is_caught(function, arguments, symbol):
    function(*arguments)
    found = set().union(*taken(folder_of(HERE), f"test_no_libm.{function.__name__}-").values())
    assert any(symbol in name for name in found), found


def test_what_the_cpu_does_itself_is_no_call():
    assert root_and_rounding(2.25) == 5.75
    assert taken(folder_of(HERE), "test_no_libm.root_and_rounding-") != {}
    assert set().union(*taken(folder_of(HERE), "test_no_libm.root_and_rounding-").values()) == set()


def test_no_compiled_code_of_the_package_calls_the_librarys_mathematics():
    entries = {value.__name__ for module in modules() for value in vars(module).values() if isinstance(value, Entry)}
    for kind in (np.float32, np.float64):
        for name in ("exp", "log", "tanh", "sigmoid", "gelu", "gelu_slope", "sqrt", "rsqrt", "sin", "cos", "erf"):
            getattr(elementwise, name)(np.ones(3, kind))
        elementwise.pow(np.ones(3, kind), 0.5)
    soft_targets.crystal_rows(np.arange(64), 4, 0.1, 0.7, 0.3)
    soft_targets.random_rows(64, 4, 1)
    lattice.features(20, 8), primes.sieve(100), primes.gcd_matrix([4, 6], [8, 9]), ulam.numbers(ulam.places([1, 9]))
    folders = {folder_of(path) for path in PACKAGE.rglob("*.py")}
    found = {name: names for folder in folders for name, names in taken(folder).items()}
    compiled = {name.split(".", 1)[1].rsplit("-", 1)[0] for name in found}
    missing = entries - {name.split(".")[-1] for name in compiled}
    assert not missing, f"not in the cache: {missing}"  # entries compile as their modules are imported
    assert {"compute_shard", "update_block", "work", "run_pass", "choose_token"} <= entries
    assert ("pack_unit" in entries) == HAS_BF16
    assert not {name: names for name, names in found.items() if names}
