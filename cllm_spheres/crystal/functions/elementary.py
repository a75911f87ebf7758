"""Elementary functions of float32 or float64, in jitted code: each takes single.py's or double.py's form by its type.

    from cllm_spheres.crystal.functions import elementary as E
    y = E.tanh(x)

From Python they are for single numbers: Python's floats and numpy's float64, or numpy's float32. Arrays:
crystal/functions/elementwise.py. In loops that have to vectorise, sin and cos are `sin_near` and `cos_near`, right for
|x| <= angles.FAR and NaN beyond; `pow_plain` is pow where x is positive and normal and y finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from cllm_spheres.crystal.functions import double, power, single


def _by_type(of_single: Any, of_double: Any) -> Callable[[Any], Any]:
    """Decorator: a name -> a function that is the one or the other, for Python and for jitted code."""

    def apply(named: Any) -> Any:
        def function(*x: Any) -> Any:
            kind = np.float32 if all(isinstance(value, np.float32) for value in x) else float
            return (of_single if kind is np.float32 else of_double)(*map(kind, x))

        function.__name__, function.__doc__ = named.__name__, named.__doc__
        if named.__code__.co_argcount == 1:

            def choose(x):
                of = {types.float32: of_single, types.float64: of_double}.get(x)
                return (lambda x: of(x)) if of else None
        else:

            def choose(x, y):
                of = {types.float32: of_single, types.float64: of_double}.get(x) if x == y else None
                return (lambda x, y: of(x, y)) if of else None

        overload(function, jit_options={"forceinline": True, "error_model": "numpy"})(choose)
        return function

    return apply


@_by_type(single.exp, double.exp)
def exp(x):
    """e**x."""


@_by_type(single.log, double.log)
def log(x):
    """Natural logarithm."""


@_by_type(single.tanh, double.tanh)
def tanh(x):
    """Hyperbolic tangent."""


@_by_type(single.sigmoid, double.sigmoid)
def sigmoid(x):
    """1 / (1 + exp(-x))."""


@_by_type(single.gelu, double.gelu)
def gelu(x):
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x**3)))."""


@_by_type(single.gelu_slope, double.gelu_slope)
def gelu_slope(x):
    """The derivative of `gelu`."""


@_by_type(single.square_root, double.square_root)
def sqrt(x):
    """Square root."""


@_by_type(single.rsqrt, double.rsqrt)
def rsqrt(x):
    """1 / sqrt(x)."""


@_by_type(single.sin, double.sin)
def sin(x):
    """Sine of an angle in radians, of any size."""


@_by_type(single.cos, double.cos)
def cos(x):
    """Cosine of an angle in radians, of any size."""


@_by_type(single.sin_near, double.sin_near)
def sin_near(x):
    """Sine for |x| <= angles.FAR."""


@_by_type(single.cos_near, double.cos_near)
def cos_near(x):
    """Cosine for |x| <= angles.FAR."""


@_by_type(single.erf, double.erf)
def erf(x):
    """Error function."""


@_by_type(power.single_pow, power.double_pow)
def pow(x, y):
    """x**y, with C's special values."""


@_by_type(power.single_pow_plain, power.double_pow_plain)
def pow_plain(x, y):
    """`pow` for normal x > 0 and finite y."""
