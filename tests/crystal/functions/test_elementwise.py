"""The elementary functions over arrays: errors over samples, special values, subnormals, places; and wrong arguments.

The bounds are those of docs/crystal.md, measured over all 2**32 float32 and up to 1e9 float64 by bench/functions.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from cllm_spheres_bench import functions_accuracy as A
from numba import types

from cllm_spheres.crystal.functions import elementary as E
from cllm_spheres.crystal.functions import elementwise as W
from cllm_spheres.crystal.functions.angles import FAR
from cllm_spheres.crystal.jit import kernel
from cllm_spheres.errors import InputError
from cllm_spheres.kernels.fpu import flush_subnormals, restore

# function -> the largest error in ulp of float32 and of float64
BOUNDS = {
    "exp": (0.74, 0.73), "log": (0.87, 0.86), "tanh": (1.35, 1.35), "sigmoid": (1.48, 1.50), "gelu": (0.51, 1.49),
    "gelu_slope": (0.50, 2.30), "sqrt": (0.50, 0.50), "rsqrt": (1.50, 1.50), "sin": (0.51, 0.80), "cos": (0.51, 0.80),
    "erf": (1.42, 1.63), "pow": (0.51, 0.75),
}  # fmt: skip
KINDS = ("float32", "float64")
ONE = [name for name in BOUNDS if name != "pow"]
every = pytest.mark.parametrize("name", BOUNDS)
of_one = pytest.mark.parametrize("name", ONE)
kinds = pytest.mark.parametrize("kind", KINDS)


def tiny(kind):
    return np.finfo(kind).tiny


def arguments(name, kind, n=4096):
    """Numbers all over the range of a function; of pow pairs."""
    if name == "pow":
        return A.sample_pow(np.dtype(kind).type, 7, n)
    with np.errstate(all="ignore"):
        return (A.sample(name, 7, n).astype(kind),)


def call(name, *x):
    return getattr(W, name)(*x)


@every
@kinds
def test_no_sample_is_further_off_than_is_documented(name, kind):
    found, bound = A.Found(), BOUNDS[name][KINDS.index(kind)]
    blocks = A.blocks_of(kind, name, 10**9)
    # float32: every 2**9-th block of all arguments; float64: blocks of 2**14
    for block in range(3, blocks, blocks // 40) if kind == "float32" else range(3):
        A.add_block(found, kind, name, block)
    assert found.ulp <= bound, f"{found.ulp} ulp at {found.at}"
    assert found.wrong == 0, f"wrong at {found.wrong_at}"
    assert found.count > 40_000


@every
@kinds
def test_special_numbers(name, kind):
    found = A.Found()
    A.add_specials(found, kind, name)
    assert found.wrong == 0, f"wrong at {found.wrong_at}"
    assert found.ulp <= BOUNDS[name][KINDS.index(kind)], found


def test_the_comparison_itself_can_fail():
    x = A.sample("exp", 1, 1000)
    right, low = A.R.pairs("exp", x)
    right = np.where(right < tiny("float64"), 0.0, right)
    floor = np.zeros(1000)
    for wrong in (right * (1 + 2.0**-51), np.where(right > 1, np.nan, right), np.where(right == 0, -0.0, right)):
        found = A.Found()
        A.compare(found, wrong, right, low, floor, x)
        assert found.ulp > 1.4 or found.wrong > 0
    found = A.Found()
    A.compare(found, right, right, low, floor, x)
    assert found.ulp <= 0.5 and found.wrong == 0


@pytest.mark.parametrize("name", [name for name in ONE if hasattr(math, name)])
def test_float64_is_the_standard_librarys_to_an_ulp_or_two(name):
    # the standard library is right to an ulp
    x = arguments(name, "float64", 2000)[0]
    x = x[np.isfinite(x) & (np.abs(x) > 1e-300) & (np.abs(x) < 700)]
    x = np.abs(x) if name in ("log", "sqrt") else x
    out = call(name, x)
    expected = np.array([getattr(math, name)(value) for value in x])
    normal = np.abs(expected) >= tiny("float64")
    error = np.abs(out - expected)[normal] / np.spacing(np.abs(expected[normal]))
    assert error.max() <= BOUNDS[name][1] + 1 and normal.sum() > 100


@pytest.mark.parametrize("x", [1e22, 6381956970095103.0 * 2.0**797, 2.0**1023, FAR + 0.5, 1e5, 355.0, 2.0**30, 3e300])
def test_angles_of_any_size(x):
    # 6381956970095103 * 2**797 is the float64 next to a multiple of pi/2. Fractions of pi to 1,400 bits tell the truth
    from fractions import Fraction

    from cllm_spheres.crystal.functions.reals import pi

    half = pi() / 2
    n = round(Fraction(x) / half)
    left = float(Fraction(x) - n * half)
    expected = [math.sin(left), math.cos(left), -math.sin(left), -math.cos(left)]
    assert math.isclose(E.sin(x), expected[n % 4], rel_tol=4e-16)
    assert math.isclose(E.cos(x), expected[(n + 1) % 4], rel_tol=4e-16)
    assert E.sin(-x) == -E.sin(x) and E.cos(-x) == E.cos(x)


def test_angles_that_are_not_near_are_nan_where_only_near_ones_are_asked_for():
    assert math.isnan(E.sin_near(2 * FAR)) and math.isnan(E.cos_near(2 * FAR)) and E.sin_near(FAR) == E.sin(FAR)


@every
@kinds
@pytest.mark.parametrize("repeats", [1, 16, 33])  # the scalar form, whole vectors, vectors and a tail
def test_a_number_has_the_same_bits_in_vectors_and_alone(name, kind, repeats):
    x = arguments(name, kind, 600)
    together = call(name, *x)
    for i in range(0, x[0].size, 37):
        with np.errstate(all="ignore"):
            row = call(name, *(np.full(repeats, a[i]) for a in x))
        assert row.tobytes() == together[i : i + 1].tobytes() * repeats, [a[i] for a in x]


@every
@kinds
def test_python_and_arrays_have_the_same_bits(name, kind):
    x = arguments(name, kind, 40)
    together = call(name, *x)
    for i in range(together.size):
        one = getattr(E, name)(*(a[i] if kind == "float32" else float(a[i]) for a in x))
        assert np.array(one, kind).tobytes() == together[i : i + 1].tobytes()


@kernel
def flushed(on):
    """Set the CPU to flush subnormals; the state before, for `restore`."""
    return flush_subnormals()


@kernel
def unflushed(state):
    restore(state)


@every
@kinds
def test_the_bits_do_not_depend_on_whether_the_cpu_flushes_subnormals(name, kind):
    x = arguments(name, kind)
    small = A.special_numbers(np.dtype(kind).type)
    x = tuple(np.concatenate([a, small * tiny(kind), small]) for a in x)
    x = tuple(np.nan_to_num(a, nan=0.5, posinf=2.0, neginf=-2.0) for a in x)
    usual = call(name, *x)
    state = flushed(True)
    try:
        same = call(name, *x)
    finally:
        unflushed(state)
    assert np.array_equal(same.view(f"u{same.itemsize}"), usual.view(f"u{usual.itemsize}"))


@of_one
@kinds
def test_a_subnormal_number_counts_as_zero_of_its_sign(name, kind):
    subnormal = np.array([tiny(kind) / 4, -tiny(kind) / 4, np.finfo(kind).smallest_subnormal], kind)
    assert (np.abs(subnormal) > 0).all()
    zeros = np.array([0.0, -0.0, 0.0], kind)
    assert call(name, subnormal).tobytes() == call(name, zeros).tobytes()


@every
@kinds
def test_no_result_is_subnormal(name, kind):
    x = arguments(name, kind)
    out = np.abs(call(name, *x))
    assert not ((out > 0) & (out < tiny(kind))).any()
    assert call("exp", np.array([np.log(tiny(kind)) - 0.1], kind)) == 0  # e**x would be subnormal


@pytest.mark.parametrize("name", ["exp", "log", "sigmoid", "sqrt"])
def test_float32_never_falls_where_the_function_rises(name):
    low, high = {"exp": (-88, 89), "log": (1e-38, 3e38), "sigmoid": (-90, 20), "sqrt": (0, 3e38)}[name]
    first = np.linspace(low, high, 200_000).astype(np.float32)
    near = np.float32(1).view(np.int32) + np.arange(-100_000, 100_000, dtype=np.int32)
    for x in (first, near.view(np.float32)):
        out = call(name, np.sort(x))
        assert (out[1:] >= out[:-1]).all()


def test_odd_functions_are_odd_and_even_ones_even():
    x = arguments("tanh", "float64")[0]
    x = x[np.abs(x) > 1e-300]
    for name in ("tanh", "erf", "sin"):
        assert (call(name, -x) == -call(name, x)).all()
    assert (call("cos", -x) == call("cos", x)).all()
    # gelu(x) - gelu(-x) = x: sums of two rounded numbers
    assert np.allclose(call("gelu", x) - call("gelu", -x), x, rtol=1e-15, atol=0)


def test_gelu_is_the_models():
    from cllm_spheres.kernels.gelu import gelu_backward, gelu_forward

    x = np.linspace(-6, 6, 4001, dtype=np.float32)
    out, slope = np.empty_like(x), np.ones_like(x)
    gelu_forward(x, out)
    gelu_backward(x, slope)
    # the kernel's exponent is off by some 2**-23 of itself, and that is at most 20 where it matters
    assert np.abs(out - W.gelu(x)).max() < 4e-6 and np.abs(slope - W.gelu_slope(x)).max() < 4e-6


@kernel
def in_a_kernel(x_N, out_N):
    for i in range(x_N.size):
        out_N[i] = E.tanh(x_N[i]) * E.erf(x_N[i]) + E.pow(x_N[i], x_N[i])


@kinds
def test_kernels_take_the_form_of_their_numbers_kind(kind):
    x = np.linspace(0.1, 3, 50).astype(kind)
    out = np.empty_like(x)
    in_a_kernel(x, out)
    # a fused multiply-add may round once where numpy rounds twice
    assert np.allclose(out, W.tanh(x) * W.erf(x) + W.pow(x, x), rtol=2 * np.finfo(kind).eps, atol=0)
    signature = types.float32 if kind == "float32" else types.float64
    assert any(given[0].dtype == signature for given in in_a_kernel.signatures)


# ---- arrays


def test_out_may_be_x_or_overlap_it():
    x = np.linspace(-3, 3, 1000)
    expected = W.exp(x)
    same = x.copy()
    assert W.exp(same, out=same) is same and (same == expected).all()
    overlapping = np.concatenate([x, [0.0]])
    W.exp(overlapping[:-1], out=overlapping[1:])
    assert (overlapping[1:] == expected).all()


def test_shapes_and_strides():
    x = np.arange(24.0).reshape(2, 3, 4)
    assert (
        W.sqrt(x).shape == (2, 3, 4)
        and (W.sqrt(x.T) == np.sqrt(x.T)).all()
        and (W.sqrt(x[:, ::2]) == np.sqrt(x[:, ::2])).all()
    )
    assert W.exp(np.float64(0.0)).shape == () and W.exp(np.empty(0)).size == 0 and W.exp(1.5).dtype == np.float64
    assert (W.pow(x, 2) == x * x).all() and W.pow(x.astype(np.float32), 0.5).dtype == np.float32


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: W.exp(np.arange(3)), r"elementwise\.exp takes float32 or float64, not int64"),
        (lambda: W.exp(np.ones(3, np.float16)), "not float16"),
        (lambda: W.exp(np.ones(3), out=np.ones(4)), r"out is float64 \(4,\), but x is float64 \(3,\)"),
        (lambda: W.exp(np.ones(3), out=np.ones(3, np.float32)), "out is float32"),
        (lambda: W.exp(np.ones(3), out=[1, 2, 3]), "out is list"),
        (lambda: W.exp(np.ones(3), out=np.ones(6)[::2]), "C-contiguous"),
        (lambda: W.pow(np.ones(3), np.ones(4)), r"y is float64 \(4,\), but x is float64 \(3,\)"),
        (lambda: W.pow(np.ones(3), np.ones(3, np.float32)), "y is float32"),
    ],
)
def test_wrong_arguments_are_refused_in_words(call, said):
    with pytest.raises(InputError, match=said):
        call()
