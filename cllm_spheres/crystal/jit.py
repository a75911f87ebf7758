"""A Python function -> machine code, cached in a folder that knows what it was made from.

numba's cache looks only at the file of the outer function: a change in an imported helper would run old code.
So the folder's name is a hash of every source file that may be compiled, of the versions of numba and llvmlite
of the CPU's features and of the backends chosen: whatever changes bits changes the folder. Inside it a function is
found by the name of its module, so that every copy of the package on a machine finds what one of them has compiled.

Flags. `contract` (fused multiply-add) is allowed everywhere, `reassoc` only in `reduction`s over a length that
the caller fixes. Never `nnan` or `ninf`: with them NaN tests are deleted. `error_model="numpy"` removes the
divide-by-zero check that stops vectorisation.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import llvmlite.ir as ir
import numba
import numpy as np
from numba import types
from numba.core import caching, cgutils, registry, sigutils
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from cllm_spheres import caches
from cllm_spheres.crystal import cpu
from cllm_spheres.errors import InputError

if cpu.cap() is not None:
    numba.config.reload_config()  # `cpu` has changed what numba reads from the environment
    if registry.cpu_target.target_context.codegen().magic_tuple()[1:] != (cpu.cpu_name(), cpu.cpu_features()):
        raise InputError(
            f"{cpu.CPU_VARIABLE} is set, and numba has compiled for this CPU's own level in this process already."
            " Import cllm_spheres before the first compilation."
        )

PACKAGE = Path(__file__).resolve().parent.parent
# Jitted code, and the modules whose constants it takes in.
COMPILED = (
    "crystal/*.py", "crystal/*/*.py", "faults.py", "inference/ops.py", "inference/registers.py", "inference/team.py",
    "kernels/*.py", "kernels/*/*.py", "model/initialise.py", "model/ops/*.py", "model/record.py", "model/run.py",
    "spheres/atomics.py", "spheres/context.py", "spheres/engine.py", "spheres/firing.py", "spheres/memory.py",
    "spheres/phases.py", "text/batches.py",
)  # fmt: skip
OPTIONS: dict[str, Any] = dict(error_model="numpy", boundscheck=False)
COMPILING = "Compiling kernels, once on this machine: half a minute, longer where it is busy."
TELL_AFTER_S = 3.0  # without a compilation the next one is told of again


def source_hash() -> str:
    """sha256 over the names and contents of all sources that may be compiled."""
    digest = hashlib.sha256()
    for pattern in COMPILED:
        for path in sorted(PACKAGE.glob(pattern)):
            digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _cache_folder() -> Path:
    key = [
        source_hash(),
        numba.__version__,
        llvmlite.__version__,
        np.__version__,
        sys.version,
        cpu.cpu_name(),
        cpu.cpu_features(),
        cpu.gemm_backend(),
        str(cpu.bf16_backend()),
    ]
    name = hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]
    if (root := caches.folder()) is not None:
        folder = root / "kernels" / name
        with contextlib.suppress(OSError):
            caches.use(folder)  # for as long as this process lives
            if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
                return folder
    return Path(tempfile.mkdtemp(prefix="cllm-spheres-"))


CACHE_FOLDER = _cache_folder()


def is_cold(what: str) -> bool:
    """True where these kernels have not been compiled on this machine yet (it takes about half a minute)."""
    return not (CACHE_FOLDER / f"complete-{what}").exists()


def mark_warm(what: str) -> None:
    """Remember that these kernels have been compiled into the cache."""
    (CACHE_FOLDER / f"complete-{what}").touch()


def say_on_stderr(text: str) -> None:
    """For people at a terminal or in a notebook."""
    print(text, file=sys.stderr, flush=True)


announce: Callable[[str], None] = say_on_stderr  # told that this process compiles; a process may put its own here
_last_compiled = float("-inf")


class _Locator(caching._CacheLocator):
    """Where numba keeps the machine code of a function.

    That of a function of this package is found by its module's name, whatever the path and the times of its file: the
    folder knows the sources. Other functions, of tests and benchmarks, are found by path and contents of their file.
    """

    def __init__(self, function: Any) -> None:
        self._py_file, self._lineno = inspect.getfile(function), function.__code__.co_firstlineno
        self._source = Path(self._py_file).resolve()
        self._ours = self._source.is_relative_to(PACKAGE)

    def get_cache_path(self) -> str:
        if not self._ours:
            return str(CACHE_FOLDER / self.get_suitable_cache_subpath(self._py_file))
        return str(CACHE_FOLDER / ".".join(self._source.relative_to(PACKAGE).with_suffix("").parts))

    def get_source_stamp(self) -> str:
        return "" if self._ours else hashlib.sha256(self._source.read_bytes()).hexdigest()

    def get_disambiguator(self) -> str:
        return str(self._lineno)


class _Files(caching.CompileResultCacheImpl):
    """numba's files, with our locator."""

    def __init__(self, function: Any) -> None:
        self._lineno, self._locator = function.__code__.co_firstlineno, _Locator(function)
        name = f"{Path(inspect.getfile(function)).stem}.{function.__qualname__}"
        self._filename_base = self.get_filename_base(name, getattr(sys, "abiflags", ""))


class _Cache(caching.FunctionCache):
    """numba's cache of a function, which says so before it has to compile."""

    _impl_class = _Files

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        found = super().load_overload(signature, target_context)
        if found is None and time.monotonic() - _last_compiled > TELL_AFTER_S:
            announce(COMPILING)
            _compiled()
        return found

    def save_overload(self, signature: Any, data: Any) -> None:
        super().save_overload(signature, data)
        _compiled()


def _compiled() -> None:
    global _last_compiled
    _last_compiled = time.monotonic()


def _jit(function: Any, **options: Any) -> Any:
    dispatcher = numba.njit(**OPTIONS, **options)(function)
    dispatcher._cache = _Cache(function)
    return dispatcher


def kernel(function: Any) -> Any:
    """Jit with fused multiply-adds, without the GIL."""
    return _jit(function, nogil=True, fastmath={"contract"})


def reduction(function: Any) -> Any:
    """Jit a sum over a fixed length: the compiler may order its terms to fill the vector lanes."""
    return _jit(function, nogil=True, fastmath={"contract", "reassoc"})


def element(function: Any) -> Any:
    """Jit a function of a few numbers for use inside loops: always inlined, products and sums fused only by `fma`.

    So it has the same bits in a vector, alone, and in every kernel.
    """
    return _jit(function, nogil=True, forceinline=True)


@intrinsic
def pointer(typing_context, address):
    """An address as a pointer that numba.carray takes, for jitted code."""
    return types.voidptr(types.int64), lambda c, b, s, a: b.inttoptr(a[0], cgutils.voidptr_t)


def at_address(signature: Any) -> Any:
    """A function for jitted code that calls what is at an address: f(address, *arguments).

    For code that is chosen when a program runs. signature: of int64 and float64, as an `Entry` has.
    """
    to_llvm = {types.int64: ir.IntType(64), types.float64: ir.DoubleType()}
    kind = ir.FunctionType(to_llvm[signature.return_type], [to_llvm[a] for a in signature.args])

    def call(typing_context: Any, address: Any, *given: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            return b.call(b.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])

        return signature.return_type(types.int64, *signature.args), generate

    names = ["typing_context", "address", *(f"argument_{i}" for i in range(len(signature.args)))]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return intrinsic(call)


_symbols: set[str] = set()  # of all entries of this process


class Entry:
    """A phase's one machine code: compiled once with one signature, called by address from everywhere.

    `call` is for Python (it releases the GIL), `external` for jitted code, where it is never inlined: numba would
    vectorise it anew in each caller and change its bits.
    """

    def __init__(self, function: Any, signature: Any) -> None:
        options = OPTIONS | {"fastmath": {"contract"}}
        compiled = CFunc(function, sigutils.normalize_signature(signature), locals={}, options=options)
        compiled._cache = _Cache(function)
        compiled.compile()
        symbol = f"{function.__module__}.{function.__qualname__}".replace(".", "_")
        if symbol in _symbols:  # the second would take the place of the first without a word
            raise ValueError(f"there are two entries {symbol}")
        _symbols.add(symbol)
        llvm.add_symbol(symbol, compiled.address)
        self._keep = compiled
        self.address = int(compiled.address)
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__
        self.call: Callable[..., Any] = compiled.ctypes
        self.external = types.ExternalFunction(symbol, signature)


def entry(signature: Any) -> Callable[[Any], Entry]:
    """Decorator: the function becomes an `Entry`; its arguments are int64 (addresses too) and float64."""
    return lambda function: Entry(function, signature)
