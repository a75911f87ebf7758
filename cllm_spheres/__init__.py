"""Train a small GPT on every core of a CPU server, with the same bits for any number of workers.

import cllm_spheres as cs
run = cs.train("folder", preset="small", workers=2)
model = cs.load(run.path)
print(model.generate("import ", tokens=80, seed=7))
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from cllm_spheres.errors import InputError, Interrupted, NonFinite, RunFailed, SphereLost, SpheresError

if TYPE_CHECKING:
    from cllm_spheres.api import Model, Run, Score, evaluate, load, runs, train

try:
    __version__ = version("cllm-spheres")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0"

__all__ = [
    "InputError", "Interrupted", "Model", "NonFinite", "Run", "RunFailed", "Score", "SphereLost", "SpheresError",
    "evaluate", "load", "runs", "train",
]  # fmt: skip
_LAZY = (
    "Model",
    "Run",
    "Score",
    "evaluate",
    "load",
    "runs",
    "train",
)  # numba and all the rest are imported when one of these is first used


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module("cllm_spheres.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
