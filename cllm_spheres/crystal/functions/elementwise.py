"""Elementary functions of numpy arrays of float32 or float64 -> arrays of the same kind and shape, on one thread.

    from cllm_spheres.crystal.functions import elementwise
    y = elementwise.exp(x)                # or elementwise.exp(x, out=y); out may be x

A number's bits depend on nothing but itself: not on its place, its neighbours, the CPU's vectors, or the C library.
`pow` takes two arrays of one shape, or an array and a number. Errors, special values and speeds: docs/crystal.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cllm_spheres.crystal.functions import angles
from cllm_spheres.crystal.functions import elementary as E
from cllm_spheres.crystal.functions.bits import magnitude
from cllm_spheres.crystal.jit import kernel
from cllm_spheres.errors import InputError

BLOCK = 512  # numbers whose angles are all near, or else are taken one by one
FAR = angles.FAR
KINDS = (np.dtype(np.float32), np.dtype(np.float64))


def _checked(name: str, x: Any) -> np.ndarray:
    x = np.asarray(x)
    if x.dtype not in KINDS:
        raise InputError(f"elementwise.{name} takes float32 or float64, not {x.dtype}: convert with x.astype(...).")
    return x


def _target(name: str, x: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    if out is None:
        return np.empty(x.shape, x.dtype)
    if not isinstance(out, np.ndarray) or out.dtype != x.dtype or out.shape != x.shape:
        found = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
        raise InputError(f"elementwise.{name}: out is {found}, but x is {x.dtype} {x.shape}.")
    if not out.flags.c_contiguous or not out.flags.writeable:
        raise InputError(f"elementwise.{name}: out has to be C-contiguous and writeable.")
    return out


def _flat(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    """x as a row in memory of its own: the loops vectorise where what they write cannot be what they read."""
    return (x.copy() if np.may_share_memory(x, out) else np.ascontiguousarray(x)).reshape(-1)


def _of_arrays(loop: Any) -> Callable[..., np.ndarray]:
    """A loop over rows -> the function for arrays."""
    name = loop.__name__[1:]

    def function(x: Any, out: np.ndarray | None = None) -> np.ndarray:
        x = _checked(name, x)
        out = _target(name, x, out)
        loop(_flat(x, out), out.reshape(-1))
        return out

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"{getattr(E, name).__doc__} x: float32 or float64, any shape; out: C-contiguous, or made."
    return function


@kernel
def _exp(x_N, out_N):
    for i in range(x_N.size):
        out_N[i] = E.exp(x_N[i])


@kernel
def _log(x_N, out_N):
    for i in range(x_N.size):
        out_N[i] = E.log(x_N[i])


@kernel
def _tanh(x_N, out_N):
    for i in range(x_N.size):
        out_N[i] = E.tanh(x_N[i])


@kernel
def _sigmoid(x_N, out_N):
    for i in range(x_N.size):
        out_N[i] = E.sigmoid(x_N[i])


@kernel
def _gelu(x_N, out_N):
    for i in range(x_N.size):
        out_N[i] = E.gelu(x_N[i])


@kernel
def _gelu_slope(x_N, out_N):
    for i in range(x_N.size):
        out_N[i] = E.gelu_slope(x_N[i])


@kernel
def _sqrt(x_N, out_N):
    for i in range(x_N.size):
        out_N[i] = E.sqrt(x_N[i])


@kernel
def _rsqrt(x_N, out_N):
    for i in range(x_N.size):
        out_N[i] = E.rsqrt(x_N[i])


@kernel
def _erf(x_N, out_N):
    for i in range(x_N.size):
        out_N[i] = E.erf(x_N[i])


@kernel
def _is_near(x_N):
    """Whether every |x| <= FAR."""
    beyond = 0
    for i in range(x_N.size):
        beyond += 0 if magnitude(x_N[i]) <= FAR else 1
    return beyond == 0


@kernel
def _sin(x_N, out_N):
    for start in range(0, x_N.size, BLOCK):
        x, out = x_N[start : start + BLOCK], out_N[start : start + BLOCK]
        if _is_near(x):
            for i in range(x.size):
                out[i] = E.sin_near(x[i])
        else:
            for i in range(x.size):
                out[i] = E.sin(x[i])


@kernel
def _cos(x_N, out_N):
    for start in range(0, x_N.size, BLOCK):
        x, out = x_N[start : start + BLOCK], out_N[start : start + BLOCK]
        if _is_near(x):
            for i in range(x.size):
                out[i] = E.cos_near(x[i])
        else:
            for i in range(x.size):
                out[i] = E.cos(x[i])


@kernel
def _is_plain(x_N, y_N, tiny):
    """Whether every x is positive and normal, and every y finite."""
    other = 0
    for i in range(x_N.size):
        other += 0 if (x_N[i] >= tiny) & (x_N[i] < np.inf) & (magnitude(y_N[i]) < np.inf) else 1
    return other == 0


@kernel
def _pow(x_N, y_N, tiny, out_N):
    for start in range(0, x_N.size, BLOCK):
        x, y, out = x_N[start : start + BLOCK], y_N[start : start + BLOCK], out_N[start : start + BLOCK]
        if _is_plain(x, y, tiny):
            for i in range(x.size):
                out[i] = E.pow_plain(x[i], y[i])
        else:
            for i in range(x.size):
                out[i] = E.pow(x[i], y[i])


exp, log, tanh, sigmoid = _of_arrays(_exp), _of_arrays(_log), _of_arrays(_tanh), _of_arrays(_sigmoid)
gelu, gelu_slope, sqrt, rsqrt = _of_arrays(_gelu), _of_arrays(_gelu_slope), _of_arrays(_sqrt), _of_arrays(_rsqrt)
sin, cos, erf = _of_arrays(_sin), _of_arrays(_cos), _of_arrays(_erf)


def pow(x: Any, y: Any, out: np.ndarray | None = None) -> np.ndarray:
    """x**y, element by element, with C's special values. y: an array like x, or one number."""
    x = _checked("pow", x)
    out = _target("pow", x, out)
    y = np.full(x.shape, y, x.dtype) if np.ndim(y) == 0 else _checked("pow", y)
    if y.dtype != x.dtype or y.shape != x.shape:
        raise InputError(f"elementwise.pow: y is {y.dtype} {y.shape}, but x is {x.dtype} {x.shape}.")
    _pow(_flat(x, out), _flat(y, out), np.finfo(x.dtype).tiny, out.reshape(-1))
    return out
