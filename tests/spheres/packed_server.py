"""A dtype of the tests' own, "doubled", and the server of forked workers that knows it: the weights times two, in
five units of unequal size, and behind them how often each unit was packed.
"""

from __future__ import annotations

from types import SimpleNamespace

from numba import types

from cllm_spheres.crystal.jit import entry
from cllm_spheres.kernels.arrays import floats, integers
from cllm_spheres.model import dtypes
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.packed import Packing
from cllm_spheres.model.shape import Shape

SHAPE = Shape(vocab_size=257, block_size=8, layers=1, heads=2, width=32, ff_width=64)
FLOATS = Layout(SHAPE).size
UNITS = 5
_rules = dtypes.rules
_i8 = types.int64


def packing(_):
    """With a unit more that counts how often what is frozen was packed."""
    return Packing(4 * FLOATS + 8 * (UNITS + 1), UNITS, frozen_units=1, module="tests.spheres.packed_server")


def rules(dtype):
    return SimpleNamespace(**vars(_rules("fp32")) | {"packing": packing}) if dtype == "doubled" else _rules(dtype)


@entry(_i8(*[_i8] * 5))
def pack_unit(table, params, frozen, packed, unit):
    """Unit u is the part from u^2 to (u + 1)^2 twenty-fifths of the weights; the one behind them has none."""
    first, last = FLOATS * unit * unit // (UNITS * UNITS), FLOATS * (unit + 1) * (unit + 1) // (UNITS * UNITS)
    source, target = floats(params, FLOATS), floats(packed, FLOATS)
    for i in range(first, min(last, FLOATS)):
        target[i] = source[i] + source[i]
    integers(packed + 4 * FLOATS, UNITS + 1)[unit] += 1
    return 0


if __name__ == "__main__":
    dtypes.rules = rules
    from cllm_spheres.spheres.server import main

    main()
