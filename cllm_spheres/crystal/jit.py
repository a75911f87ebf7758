"""A Python function -> machine code, cached in a folder that knows what it was made from.

numba's cache looks only at the file of the outer function: a change in an imported helper would run old code.
So the folder's name is a hash of every source file that may be compiled, of the versions of numba and llvmlite
of the CPU's features and of the backends chosen: whatever changes bits changes the folder.

Flags. `contract` (fused multiply-add) is allowed everywhere, `reassoc` only in `reduction`s over a length that
the caller fixes. Never `nnan` or `ninf`: with them NaN tests are deleted. `error_model="numpy"` removes the
divide-by-zero check that stops vectorisation.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import llvmlite.ir as ir
import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from cllm_spheres.crystal import cpu

PACKAGE = Path(__file__).resolve().parent.parent
# Jitted code, and the modules whose constants it takes in.
COMPILED = (
    "crystal/*.py", "crystal/*/*.py", "faults.py", "inference/passes.py", "inference/team.py", "kernels/*.py",
    "kernels/*/*.py", "model/*.py", "spheres/atomics.py", "spheres/context.py", "spheres/engine.py",
    "spheres/firing.py", "spheres/memory.py", "spheres/phases.py", "text/batches.py",
)  # fmt: skip
OPTIONS: dict[str, Any] = dict(cache=True, error_model="numpy", boundscheck=False)


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
        os.environ.get(cpu.GEMM_VARIABLE, ""),
        str(cpu.bf16_backend()),
    ]
    name = hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for root in (Path(base) / "cllm-spheres", Path(tempfile.gettempdir()) / f"cllm-spheres-{os.getuid()}"):
        folder = root / "kernels" / name
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
                return folder
        except OSError:
            continue
    return Path(tempfile.mkdtemp(prefix="cllm-spheres-"))


CACHE_FOLDER = _cache_folder()


def is_cold(what: str) -> bool:
    """True where these kernels have not been compiled on this machine yet (it takes about half a minute)."""
    return not (CACHE_FOLDER / f"complete-{what}").exists()


def mark_warm(what: str) -> None:
    """Remember that these kernels have been compiled into the cache."""
    (CACHE_FOLDER / f"complete-{what}").touch()


def _decorate(decorator: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[Any], Any]:
    """`decorator` with our cache folder, leaving the user's own numba configuration as it was."""

    def apply(function: Any) -> Any:
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(CACHE_FOLDER)
        try:
            return decorator(*arguments, **options)(function)
        finally:
            numba.config.CACHE_DIR = before

    return apply


def kernel(function: Any) -> Any:
    """Jit with fused multiply-adds, without the GIL."""
    return _decorate(numba.njit, **OPTIONS, nogil=True, fastmath={"contract"})(function)


def reduction(function: Any) -> Any:
    """Jit a sum over a fixed length: the compiler may order its terms to fill the vector lanes."""
    return _decorate(numba.njit, **OPTIONS, nogil=True, fastmath={"contract", "reassoc"})(function)


def element(function: Any) -> Any:
    """Jit a function of a few numbers for use inside loops: always inlined, products and sums fused only by `fma`.

    So it has the same bits in a vector, alone, and in every kernel.
    """
    return _decorate(numba.njit, **OPTIONS, nogil=True, forceinline=True)(function)


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


class Entry:
    """A phase's one machine code: compiled once with one signature, called by address from everywhere.

    `call` is for Python (it releases the GIL), `external` for jitted code, where it is never inlined: numba would
    vectorise it anew in each caller and change its bits.
    """

    def __init__(self, function: Any, signature: Any) -> None:
        compiled = _decorate(numba.cfunc, signature, **OPTIONS, fastmath={"contract"})(function)
        symbol = f"cllm_spheres_{function.__name__}"
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
