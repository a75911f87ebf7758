"""An elementary function -> how many numbers a nanosecond ours, numpy's and torch's take, on one thread, in turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from cllm_spheres_bench.kernel_peers import again
from cllm_spheres_bench.kernels import measure

from cllm_spheres.crystal.functions import elementwise as W

NUMBERS = 1 << 16
# where arguments are drawn from, evenly: as a model's are, and whole turns for angles
RANGES = {"log": (1e-3, 20.0), "sqrt": (1e-3, 20.0), "rsqrt": (1e-3, 20.0), "sin": (-50.0, 50.0), "cos": (-50.0, 50.0)}


def ways(kind: str, name: str, torch: Any) -> dict[str, Callable[[int], object]]:
    """The same function of the same numbers by everybody who has it."""
    rng = np.random.default_rng(1)
    x = rng.uniform(*RANGES.get(name, (-8.0, 8.0)), NUMBERS).astype(kind)
    y = rng.uniform(-4.0, 4.0, NUMBERS).astype(kind)
    out = np.empty_like(x)
    if name == "pow":
        x = np.abs(x)
        found = {"ours": again(lambda: W.pow(x, y, out)), "numpy": again(lambda: np.power(x, y, out=out))}
    else:
        ours = getattr(W, name)
        found = {"ours": again(lambda: ours(x, out))}
        if numpys := getattr(np, name, None):
            found["numpy"] = again(lambda: numpys(x, out=out))
    if torch is not None:
        found["torch"] = again(_of_torch(name, torch, x, y))
    return found


def _of_torch(name: str, torch: Any, x: np.ndarray, y: np.ndarray) -> Callable[[], object]:
    tx, ty, out = torch.from_numpy(x), torch.from_numpy(y), torch.empty(NUMBERS, dtype=torch.from_numpy(x).dtype)
    ones, aten = torch.ones_like(tx), torch.ops.aten
    if name == "pow":
        return lambda: torch.pow(tx, ty, out=out)
    if name == "gelu":
        return lambda: aten.gelu.out(tx, approximate="tanh", out=out)
    if name == "gelu_slope":
        return lambda: aten.gelu_backward.grad_input(ones, tx, approximate="tanh", grad_input=out)
    function = getattr(torch, name)
    return lambda: function(tx, out=out)


def rates(kind: str, name: str, torch: Any, seconds: float, repeats: int) -> dict[str, Any]:
    """Numbers a nanosecond of every way, as `spread` gives them."""
    found = measure(ways(kind, name, torch), NUMBERS, seconds, repeats)
    assert all(math.isfinite(one["median"]) for one in found.values())
    return found
