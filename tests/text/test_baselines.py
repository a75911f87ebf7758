"""The unigram and bigram losses against a slow, obvious twin."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_spheres.text import baselines
from cllm_spheres.text.baselines import ngram_losses


def naive(train, contexts, targets, vocab_size, weight):
    """Mean unigram and bigram loss, token by token with dictionaries."""
    tokens, pairs, firsts = Counter(train), Counter(pairwise(train)), Counter(train[:-1])
    unigram = bigram = 0.0
    for a, b in zip(contexts, targets, strict=True):
        p = (tokens[b] + 1) / (len(train) + vocab_size)
        q = weight * pairs[a, b] / firsts[a] + (1 - weight) * p if firsts[a] else p
        unigram, bigram = unigram - math.log(p), bigram - math.log(q)
    return unigram / len(targets), bigram / len(targets)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9).flatmap(lambda v: st.tuples(
    st.just(v), st.lists(st.integers(0, v - 1), min_size=1, max_size=60),
    st.lists(st.tuples(st.integers(0, v - 1), st.integers(0, v - 1)), min_size=1, max_size=20))))  # fmt: skip
def test_losses_are_those_of_the_slow_twin(case):
    vocab_size, train, pairs = case
    contexts, targets = zip(*pairs, strict=True)
    got = ngram_losses(np.array(train, np.uint16), np.array(contexts), np.array(targets), vocab_size)
    unigram, bigram = naive(train, contexts, targets, vocab_size, got.weight)
    assert got.unigram == pytest.approx(unigram, rel=1e-12)  # sums in another order
    assert got.bigram == pytest.approx(bigram, rel=1e-12)


def test_the_weight_is_the_best_on_the_end_of_the_training_ids():
    rng = np.random.default_rng(0)
    train = np.cumsum(rng.integers(0, 3, 4000)) % 17
    got = ngram_losses(train, train[:-1], train[1:], 17)
    border = 3600
    held_out = train[border - 1 :].tolist()
    losses = {k: naive(train[:border].tolist(), held_out[:-1], held_out[1:], 17, k / 64)[1] for k in range(64)}
    assert got.weight * 64 == min(losses, key=losses.get)
    assert got.bigram < 0.5 * got.unigram


def test_chunks_and_a_large_vocabulary_change_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    train = (rng.zipf(1.3, 20_000) % 65_536).astype(np.uint16)
    whole = ngram_losses(train, train[:500], train[1:501], 65_536)
    monkeypatch.setattr(baselines, "_CHUNK", 777)
    assert ngram_losses(train, train[:500], train[1:501], 65_536) == whole


def test_unseen_pairs_and_tokens_cost_a_finite_loss():
    got = ngram_losses(np.zeros(1000, np.uint16), np.array([0, 5, 6]), np.array([7, 0, 7]), 8)
    assert math.isfinite(got.unigram) and math.isfinite(got.bigram)


@pytest.mark.parametrize("train", [[], [1], [1, 2]])
def test_training_parts_too_short_to_choose_a_weight_use_the_unigram(train):
    got = ngram_losses(np.array(train, np.uint16), np.array([0]), np.array([1]), 3)
    assert got.weight == 0 and got.bigram == got.unigram == pytest.approx(
        -math.log((train.count(1) + 1) / (len(train) + 3))
    )
