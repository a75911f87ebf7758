"""The next token is a pure function of logits, options and one uniform number."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cllm_spheres.kernels.choose import SCRATCH_WORDS, choose_token

BELOW_ONE = math.nextafter(1.0, 0.0)

finite = st.floats(-80, 80, width=32) | st.sampled_from([0.0, 1.0, 3.0])  # equal ones are likely
logits = hnp.arrays(np.float32, st.integers(1, 40), elements=finite | st.just(-math.inf)).filter(
    lambda logits_V: np.isfinite(logits_V).any()
)
uniforms = st.floats(0, 1, exclude_max=True) | st.just(BELOW_ONE)
temperatures = st.floats(1e-3, 100)
top_ks = st.none() | st.integers(1, 50)
top_ps = st.none() | st.floats(0, 1, exclude_min=True)
min_ps = st.none() | st.floats(0, 1, exclude_min=True)
# The kernel's weights are float32: their exp is known to 0.74 ulp of 6e-8, the share that they reach to little more.
NEAR = 1e-6


def choose(logits_V, *, temperature, uniform, top_k=None, top_p=None, min_p=None):
    """`choose_token` with None for off, in a scratch full of what must not matter."""
    scratch = np.full(SCRATCH_WORDS * len(logits_V), -1, np.int32)
    return choose_token.call(
        logits_V.ctypes.data, len(logits_V), temperature, top_k or 0, 1.0 if top_p is None else top_p, min_p or 0.0,
        uniform, scratch.ctypes.data,
    )  # fmt: skip


def naive(logits_V, *, temperature, top_k, top_p, min_p, uniform):
    """The slow, obvious twin."""
    if temperature == 0:
        return max(range(len(logits_V)), key=lambda i: (logits_V[i], -i))
    ids = sorted(range(len(logits_V)), key=lambda i: (-logits_V[i], i))[:top_k]
    largest = float(logits_V[ids[0]])
    weights = {i: np.exp((float(logits_V[i]) - largest) / temperature) for i in ids}
    if top_p is not None:
        whole, reached, kept = _sum(weights[i] for i in ids), 0.0, []
        for i in ids:
            kept.append(i)
            reached += weights[i]
            if reached >= top_p * whole:
                break
        ids = kept
    ids = [i for i in ids if weights[i] >= (min_p or 0)]
    whole, reached = _sum(weights[i] for i in sorted(ids)), 0.0
    for i in sorted(ids):
        reached += weights[i]
        if reached > uniform * whole:
            return i
    return max(i for i in ids if weights[i] > 0)


def _sum(values):
    total = 0.0
    for value in values:
        total += value
    return total


@given(logits, st.just(0.0) | temperatures, top_ks, top_ps, min_ps, uniforms)
def test_the_same_as_the_slow_twin(logits_V, temperature, top_k, top_p, min_p, uniform):
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, uniform=uniform)
    before = logits_V.copy()
    found, expected = choose(logits_V, **options), naive(logits_V, **options)
    if found != expected:  # one of the numbers was at an edge
        moved = [
            naive(logits_V, **options | {"uniform": edge, "top_p": share, "min_p": least})
            for edge in _around(uniform, BELOW_ONE)
            for share in _around(top_p, 1.0)
            for least in _around(min_p, 1.0)
        ]
        assert found in moved
    assert np.array_equal(logits_V, before)


def _around(value, most):
    return [None] if value is None else [min(max(value * (1 + shift) + shift, 0.0), most) for shift in (-NEAR, 0, NEAR)]


@given(logits, uniforms, top_ks, top_ps)
def test_temperature_0_is_the_lowest_id_of_the_largest(logits_V, uniform, top_k, top_p):
    chosen = choose(logits_V, temperature=0, top_k=top_k, top_p=top_p, uniform=uniform)
    assert logits_V[chosen] == logits_V.max() and not (logits_V[:chosen] == logits_V.max()).any()


@given(logits, temperatures, uniforms)
def test_top_k_1_is_greedy_at_any_temperature(logits_V, temperature, uniform):
    chosen = choose(logits_V, temperature=temperature, top_k=1, uniform=uniform)
    assert chosen == choose(logits_V, temperature=0, uniform=0)


@given(logits, temperatures, uniforms, st.integers(1, 50))
def test_at_most_k_are_larger_or_equal(logits_V, temperature, uniform, top_k):
    chosen = choose(logits_V, temperature=temperature, top_k=top_k, uniform=uniform)
    assert (logits_V > logits_V[chosen]).sum() < top_k


@given(logits, temperatures, top_ks, top_ps, uniforms)
def test_an_impossible_token_is_never_chosen(logits_V, temperature, top_k, top_p, uniform):
    chosen = choose(logits_V, temperature=temperature, top_k=top_k, top_p=top_p, uniform=uniform)
    assert np.isfinite(logits_V[chosen])


@given(logits, temperatures, uniforms)
def test_a_tiny_top_p_keeps_one(logits_V, temperature, uniform):
    assert choose(logits_V, temperature=temperature, top_p=1e-12, uniform=uniform) == int(np.argmax(logits_V))


@given(logits, temperatures, uniforms)
def test_limits_that_keep_all_change_nothing(logits_V, temperature, uniform):
    free = choose(logits_V, temperature=temperature, uniform=uniform)
    for top_k in (None, len(logits_V), 1000):
        assert choose(logits_V, temperature=temperature, top_k=top_k, top_p=1.0, uniform=uniform) == free


@given(logits, temperatures, uniforms, uniforms)
def test_a_larger_uniform_number_gives_no_smaller_id(logits_V, temperature, one, other):
    low, high = sorted([one, other])
    chosen = [choose(logits_V, temperature=temperature, top_p=0.9, uniform=uniform) for uniform in (low, high)]
    assert chosen[0] <= chosen[1]


def test_the_nucleus_is_the_smallest_set_that_reaches_p():
    logits_V = np.log(np.array([0.125, 0.5, 0.125, 0.25], np.float64)).astype(np.float32)
    uniforms = np.arange(1000) / 1000
    for top_p, expected in (
        (0.49, {1}),
        (0.51, {1, 3}),
        (0.74, {1, 3}),
        (0.76, {0, 1, 3}),
        (1.0, {0, 1, 2, 3}),
    ):
        assert {choose(logits_V, temperature=1, top_p=top_p, uniform=u) for u in uniforms} == expected


def test_a_grid_of_uniform_numbers_gives_the_softmax():
    logits_V = np.array([0.0, 1.0, -1.0, 2.0], np.float32)
    for temperature in (0.5, 1.0, 2.0):
        expected_V = np.exp(logits_V.astype(np.float64) / temperature)
        expected_V /= expected_V.sum()
        chosen = [choose(logits_V, temperature=temperature, uniform=(i + 0.5) / 4000) for i in range(4000)]
        # a grid of n numbers counts each share to within one number
        assert np.abs(np.bincount(chosen, minlength=4) / 4000 - expected_V).max() <= 1 / 4000


def test_a_tiny_temperature_is_greedy_and_silent():
    with np.errstate(all="raise", under="ignore"):
        assert choose(np.array([1, 2, -3e38], np.float32), temperature=5e-324, uniform=0.999) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_choose_nothing(bad):
    logits_V = np.full(3, -math.inf, np.float32)
    logits_V[1] = bad
    for temperature in (0, 1):
        assert choose(logits_V, temperature=temperature, uniform=0.5) == -1


@given(logits, temperatures, uniforms, st.floats(1e-3, 1))
def test_min_p_leaves_out_what_is_less_likely_than_its_share(logits_V, temperature, uniform, min_p):
    chosen = choose(logits_V, temperature=temperature, min_p=min_p, uniform=uniform)
    share = math.exp((float(logits_V[chosen]) - float(logits_V.max())) / temperature)
    assert share >= min_p * (1 - NEAR)


def test_ties_at_the_edge_of_top_k_go_to_the_lowest_ids():
    logits_V = np.array([1, 2, 1, 1, -5, 1], np.float32)
    uniforms = np.arange(100) / 100
    for top_k, expected in ((1, {1}), (2, {0, 1}), (3, {0, 1, 2}), (5, {0, 1, 2, 3, 5}), (6, {0, 1, 2, 3, 4, 5})):
        assert {choose(logits_V, temperature=5, top_k=top_k, uniform=u) for u in [*uniforms, BELOW_ONE]} == expected


def test_a_large_vocabulary_is_drawn_from_as_its_probabilities_say():
    logits_V = np.random.default_rng(2).standard_normal(50_304).astype(np.float32)
    kept = np.sort(np.argsort(-logits_V, kind="stable")[:40])
    probabilities_K = np.exp(logits_V[kept].astype(np.float64))
    edges_K = np.cumsum(probabilities_K) / probabilities_K.sum()
    for uniform in (0.001, 0.25, 0.5, 0.9, 0.999):
        assert choose(logits_V, temperature=1, top_k=40, uniform=uniform) == kept[np.searchsorted(edges_K, uniform)]
