"""Learning rates: where they begin, where they end, and what they do between."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from cllm_spheres.config import Config
from cllm_spheres.training.schedule import learning_rate


def rates(schedule, steps=100, warmup=10):
    config = Config(schedule=schedule, steps=steps, warmup=warmup, lr=1e-3, min_lr=1e-4)
    return [learning_rate(step, config) for step in range(1, steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_rises_in_equal_steps_and_its_last_step_reaches_the_peak(schedule):
    assert rates(schedule)[:10] == [1e-3 * n / 10 for n in range(1, 11)]
    assert max(rates(schedule)) == rates(schedule)[9] == 1e-3
    assert rates(schedule, warmup=0)[0] <= 1e-3


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_last_step_has_the_least_rate(schedule):
    for steps, warmup in ((100, 10), (7, 0), (2, 1), (1, 0), (10_000, 100)):
        all_rates = rates(schedule, steps, warmup)
        # lr + (min_lr - lr) in float64: two roundings of numbers near lr
        assert abs(all_rates[-1] - 1e-4) <= 2 * 2.0**-53 * 1e-3
        falling = all_rates[warmup:]
        assert falling == sorted(falling, reverse=True)


def test_constant_stays():
    assert set(rates("constant")[9:]) == {1e-3}


def test_linear_falls_in_equal_steps():
    falls = [a - b for a, b in pairwise(rates("linear")[9:])]
    assert all(
        math.isclose(fall, 9e-4 / 90, rel_tol=1e-9) for fall in falls
    )  # differences of numbers 100 times as large


def test_cosine_is_half_way_down_in_the_middle():
    for step, rate in enumerate(rates("cosine", 90, 0), start=1):
        assert math.isclose(rate, 1e-4 + 9e-4 * (1 + math.cos(math.pi * step / 90)) / 2, rel_tol=1e-12)


def test_wsd_is_stable_and_then_decays_over_the_last_fifth():
    all_rates = rates("wsd")
    assert set(all_rates[9:80]) == {1e-3}
    falls = [a - b for a, b in pairwise(all_rates[79:])]
    assert len(falls) == 20 and all(math.isclose(fall, 9e-4 / 20, rel_tol=1e-9) for fall in falls)


def test_a_rate_is_a_function_of_the_step_alone():
    config = Config(steps=100, warmup=10, lr=1e-3, min_lr=1e-4)
    assert [learning_rate(step, config) for step in reversed(range(1, 101))] == rates("cosine")[::-1]


def test_a_warm_up_that_is_the_whole_run_never_decays():
    assert rates("cosine", 10, 10) == [1e-3 * n / 10 for n in range(1, 11)]
