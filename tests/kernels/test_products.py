"""The matrix product of this CPU and that of OpenBLAS: every shape, transposition and start against numpy."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from cllm_spheres.kernels.products import BACKEND, gemm, openblas_gemm
from cllm_spheres.kernels.sizes import STRETCH, STRIPS, TILE_ROWS, product_floats
from tests.check import assert_close

PRODUCTS = {"of this CPU": gemm, "openblas": openblas_gemm}
# m, n, k: one element; parts of a tile; whole tiles; one more than those; several stretches of k; several blocks of A
SIZES = [
    (1, 1, 1), (5, 7, 3), (TILE_ROWS, 32, 16), (15, 33, 17), (29, 65, 2 * STRETCH + 1),
    (TILE_ROWS * STRIPS + 30, 50, 33),
]  # fmt: skip


@pytest.fixture
def multiply(buffer):
    """multiply(product, ta, tb, a, b, start, bias, c) with arrays that may be parts of wider ones."""

    def call(product, ta, tb, a, b, c, start=None, bias=None):
        m, n, k = *c.shape, a.shape[0] if ta else a.shape[1]
        product(
            ta, tb, m, n, k, a.ctypes.data, a.strides[0] // 4, b.ctypes.data, b.strides[0] // 4,
            0 if start is None else start.ctypes.data, 0 if start is None else start.strides[0] // 4,
            0 if bias is None else bias.ctypes.data, c.ctypes.data, c.strides[0] // 4,
            buffer(product_floats(m)).ctypes.data,
        )  # fmt: skip
        return c

    return call


def operands(rng, m, n, k, ta, tb, more=0):
    a = rng.standard_normal((k, m + more) if ta else (m, k + more), np.float32)
    b = rng.standard_normal((n, k + more) if tb else (k, n + more), np.float32)
    a, b = (a[:, :m] if ta else a[:, :k]), (b[:, :k] if tb else b[:, :n])
    return a, b, (a.T if ta else a).astype(float) @ (b.T if tb else b).astype(float)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("ta", [False, True])
@pytest.mark.parametrize("tb", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_a_product_equals_its_twin_whatever_is_added(name, m, n, k, ta, tb, rng, buffer, multiply):
    a, b, expected = operands(rng, m, n, k, ta, tb)
    start, bias = rng.standard_normal((m, n), np.float32), rng.standard_normal(n, np.float32)
    product = PRODUCTS[name]
    assert_close(multiply(product, ta, tb, a, b, buffer(m, n)), expected)
    assert_close(multiply(product, ta, tb, a, b, buffer(m, n), bias=bias), expected + bias)
    assert_close(multiply(product, ta, tb, a, b, buffer(m, n), start=start), expected + start)
    assert_close(multiply(product, ta, tb, a, b, buffer(m, n), start, bias), expected + start + bias)
    itself = buffer(m, n)
    itself[...] = start
    assert_close(multiply(product, ta, tb, a, b, itself, start=itself), expected + start)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("ta", [False, True])
@pytest.mark.parametrize("tb", [False, True])
def test_a_product_keeps_to_its_columns_where_they_are_part_of_a_wider_matrix(name, ta, tb, rng, buffer, multiply):
    m, n, k, more = 17, 39, 11, 3
    a, b, expected = operands(rng, m, n, k, ta, tb, more)
    c = buffer(m, n + more)
    assert_close(multiply(PRODUCTS[name], ta, tb, a, b, c[:, :n]), expected)
    assert np.isnan(c[:, n:]).all()


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_has_the_same_bits_at_any_alignment(name, rng, buffer, multiply):
    m, n, k = 33, 41, 29
    a, b, _ = operands(rng, m, n, k, False, False)
    results = set()
    for shift in range(9):
        moved = buffer(m * k + shift)[shift:].reshape(m, k)
        moved[...] = a
        c = buffer(m * n + shift)[shift:].reshape(m, n)
        results.add(multiply(PRODUCTS[name], False, False, moved, b, c).tobytes())
    assert len(results) == 1


@pytest.mark.skipif(BACKEND != "avx512", reason="OpenBLAS cuts its sums by the shape")
def test_an_element_is_one_chain_of_sums_so_its_bits_do_not_depend_on_the_matrix_around_it(rng, buffer, multiply):
    m, n, k = 40, 70, 2 * STRETCH + 5
    a, b, _ = operands(rng, m, n, k, False, False)
    whole = multiply(gemm, False, False, a, b, buffer(m, n))
    part = multiply(gemm, False, False, a[9:22], np.ascontiguousarray(b[:, 31:50]), buffer(13, 19))
    assert (part == whole[9:22, 31:50]).all()
    first = multiply(gemm, False, False, np.ascontiguousarray(a[:, :100]), b[:100], buffer(m, n))
    rest = multiply(gemm, False, False, np.ascontiguousarray(a[:, 100:]), b[100:], buffer(m, n), start=first)
    assert (rest == whole).all()
    turned = multiply(gemm, True, True, np.ascontiguousarray(a.T), np.ascontiguousarray(b.T), buffer(m, n))
    assert (turned == whole).all()


def test_what_is_not_finite_stays_in_its_row(rng, buffer, multiply):
    a, b, _ = operands(rng, 20, 40, 30, False, False)
    a[7, 3] = np.nan
    c = multiply(gemm, False, False, a, b, buffer(20, 40))
    assert np.isnan(c[7]).all() and np.isfinite(np.delete(c, 7, 0)).all()


FINGERPRINT = """
from cllm_spheres.crystal.jit import CACHE_FOLDER
from cllm_spheres.training.numerics import fingerprint
print(fingerprint("fp32")["backend"], CACHE_FOLDER)
"""


def run(backend):
    environment = os.environ | {"CLLM_SPHERES_GEMM": backend}
    return subprocess.run([sys.executable, "-c", FINGERPRINT], env=environment, capture_output=True, text=True)


def test_the_backend_can_be_forced_and_stands_in_the_fingerprint_and_in_the_caches_name():
    chosen, forced = run("").stdout.split(), run("openblas").stdout.split()
    assert chosen[0] == BACKEND and forced[0] == "openblas"
    assert (chosen[1] == forced[1]) == (chosen[0] == forced[0])


def test_a_backend_that_does_not_exist_is_an_error_that_names_those_that_do():
    done = run("abacus")
    assert done.returncode != 0
    assert "CLLM_SPHERES_GEMM=abacus is not possible here" in done.stderr and "openblas" in done.stderr
