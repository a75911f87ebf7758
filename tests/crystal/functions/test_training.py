"""The elementary functions, against float64 and the standard library."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cllm_spheres.crystal.functions.training import cosine_0_pi, exp, integer_power, log
from cllm_spheres.crystal.jit import kernel


@kernel
def exp_of_each(x_N, out_N):
    for i in range(x_N.size):
        out_N[i] = exp(x_N[i])


@kernel
def log_of_each(x_N, out_N):
    for i in range(x_N.size):
        out_N[i] = log(x_N[i])


def exps(x):
    out = np.full(x.size, np.nan, np.float32)
    exp_of_each(x, out)
    return out


def sample_of_exp():
    """4 million numbers evenly over [-87, 88], and every 1,000th float32 in it."""
    patterns = np.arange(0, np.float32(88).view(np.int32) + 1, 1000, np.int32).view(np.float32)
    x = np.concatenate([np.linspace(-87, 88, 4_000_000, dtype=np.float32), patterns, -patterns, [-87, 88]])
    return x[(x >= -87) & (x <= 88)].astype(np.float32)


def test_exp_is_within_1_point_1_ulp():
    x = sample_of_exp()
    expected = np.exp(x.astype(np.float64))
    ulp = np.spacing(expected.astype(np.float32)).astype(np.float64)
    error = np.abs(exps(x) - expected) / ulp
    assert error.max() <= 1.1, f"{error.max():.3f} ulp at {x[error.argmax()]!r}"


def test_exp_never_falls():
    x = np.sort(sample_of_exp())
    assert (np.diff(exps(x)) >= 0).all()


@pytest.mark.parametrize("repeats", [1, 16, 33])  # the scalar form, whole vectors, vectors and a tail
def test_exp_of_special_numbers(repeats):
    below, above = (
        np.nextafter(np.float32(-87), np.float32(-100)),
        np.nextafter(np.float32(88), np.float32(100)),
    )
    cases = {
        0.0: 1,
        -np.inf: 0,
        np.inf: np.inf,
        below: 0,
        above: np.inf,
        -3e38: 0,
        3e38: np.inf,
        1e-45: 1,
    }
    for x, expected in cases.items():
        assert (exps(np.full(repeats, x, np.float32)) == expected).all(), x
    assert (exps(np.full(repeats, -0.0, np.float32)) == 1).all()
    assert np.isnan(exps(np.full(repeats, np.nan, np.float32))).all()


def test_exp_has_the_same_bits_in_vectors_and_alone():
    x = sample_of_exp()[::4001]
    assert (exps(x) == np.concatenate([exps(x[i : i + 1]) for i in range(x.size)])).all()


def test_log_is_within_2_ulp_of_the_standard_library(rng):
    x = np.concatenate(
        [
            np.exp(rng.uniform(-700, 700, 50_000)),
            1 + rng.uniform(-1e-3, 1e-3, 20_000),
            rng.uniform(0.4, 2.5, 50_000),
        ]
    )
    x = np.concatenate([x, [1.0, 2.0, 0.5, np.finfo(float).max, np.finfo(float).tiny, math.sqrt(2), math.sqrt(0.5)]])
    out = np.full(x.size, np.nan)
    log_of_each(x, out)
    expected = np.array([math.log(value) for value in x])
    # measured against 80-bit floats: 1.99 ulp; math.log, right to half an ulp, is 2 numbers away at most
    error = np.abs(out - expected) / np.spacing(np.abs(expected))
    assert error.max() <= 2, f"{error.max()} ulp at {x[error.argmax()]!r}"


def test_log_of_special_numbers():
    assert log(1.0) == 0 and log(np.inf) == np.inf
    assert all(np.isnan(log(x)) for x in (0.0, -0.0, -1.0, -np.inf, np.nan))


def test_integer_power_is_the_power():
    for base in (0.0, 0.9, 0.999, 1.0, 1.5, -2.0):
        for exponent in (0, 1, 2, 3, 10, 63, 1000):
            if base < 1.5 or exponent < 1000:
                # each of up to 20 products rounds once, and the squared ones' errors double each time
                assert math.isclose(integer_power(base, exponent), base**exponent, rel_tol=1000 * 2**-52)
    assert integer_power(2.0, 1023) == 2.0**1023 and integer_power(0.9, 1_000_000) == 0.0


def test_cosine_0_pi_is_the_cosine():
    x = np.linspace(0, math.pi, 10_001)
    assert max(abs(cosine_0_pi(float(value)) - math.cos(value)) for value in x) < 1e-15
    assert cosine_0_pi(0.0) == 1 and cosine_0_pi(math.pi) == -1 and cosine_0_pi(math.pi / 2) == 0
