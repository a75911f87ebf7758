"""A search with a beam, beside the slow one that tries everything and the one that keeps no cache."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from cllm_spheres.errors import InputError
from cllm_spheres.inference import rules
from cllm_spheres.inference.beam import beam_search
from cllm_spheres.inference.choice import log_softmax
from tests.inference.conftest import random_model


@pytest.fixture(scope="module")
def model():
    return random_model(letters="abcd", block_size=12, size=0.5)


def logprobs_of(model, ids):
    return log_softmax(model.logits(ids)[-1])


def all_texts(model, prompt, tokens):
    """Every text of at most `tokens` tokens: (tokens, log-probability, ended by an end of text)."""
    eot = model.tokenizer.eot
    for length in range(tokens + 1):
        for ids in itertools.product(range(eot), repeat=length):
            total = sum(logprobs_of(model, [*prompt, *ids[:i]])[ids[i]] for i in range(length))
            if length == tokens:
                yield ids, total, False
            else:
                yield ids, total + logprobs_of(model, [*prompt, *ids])[eot], True


def slow_beams(model, prompt, tokens, width, length_penalty):
    """The twin: the same search with texts as lists, and all logits anew. (score, tokens) of those that ended."""
    eot, texts, done = model.tokenizer.eot, [((), 0.0)], []
    for length in range(1, tokens + 1):
        tried = []
        for rank, (ids, total) in enumerate(texts):
            for token, logprob in enumerate(logprobs_of(model, [*prompt, *ids])):
                tried.append((-(total + logprob), rank, token, ids))
        tried.sort()
        texts = []
        for place, (negative, _, token, ids) in enumerate(tried[: 2 * width]):
            if token != eot:
                texts.append(((*ids, token), -negative))
            elif place < width:
                done.append((-negative / length**length_penalty, ids))
            if len(texts) == width:
                break
        if len(done) >= width:
            return done
    return done + [(total / tokens**length_penalty, ids) for ids, total in texts]


def test_a_beam_may_be_wider_than_the_logits_of_a_pass(model, monkeypatch):
    """As where a vocabulary is large: 64 texts of 200,000 tokens have more logits than a pass gives."""
    prompt, options = [0, 1], dict(tokens=6, width=7, length_penalty=1.0, best=7, dtype="fp32", threads=1)
    expected = beam_search(model, prompt, **options)
    monkeypatch.setattr(rules, "LOGITS_FLOATS", 3 * model.shape.vocab_size)
    assert rules.most_wanted(model.shape) == 3
    assert beam_search(model, prompt, **options) == expected


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -0.5])
def test_a_wide_beam_finds_the_likeliest_of_all_texts(model, length_penalty):
    prompt, tokens = model.encode("ab"), 3
    scored = [
        (total / max(1, len(ids) + ended) ** length_penalty, ids)
        for ids, total, ended in all_texts(model, prompt, tokens)
    ]
    found = model.beams("ab", tokens=tokens, width=32, best=1, length_penalty=length_penalty)
    best = max(scored)
    assert found[0].tokens == best[1] and math.isclose(found[0].score, best[0], rel_tol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [1, 2, 3, 5])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_the_search_is_that_of_its_twin(model, width, length_penalty, threads):
    for prompt in ("a", "dcb", ""):
        found = model.beams(prompt, tokens=7, width=width, best=width, length_penalty=length_penalty, threads=threads)
        expected = sorted(slow_beams(model, model.encode(prompt), 7, width, length_penalty), reverse=True)
        assert found[0].tokens == expected[0][1]
        for beam in found:
            scores = [score for score, ids in expected if ids == beam.tokens]
            # logits agree to 1e-5 where they are not equal
            assert any(math.isclose(beam.score, score, rel_tol=1e-4) for score in scores)
            assert beam.text == model.tokenizer.decode(beam.tokens)
        assert [beam.score for beam in found] == sorted((beam.score for beam in found), reverse=True)


def test_a_beam_of_one_is_greedy(model):
    (beam,) = model.beams("a", tokens=6, width=1)
    greedy = model.generate("a", tokens=6, temperature=0)
    assert "a" + beam.text == greedy


@pytest.mark.parametrize("length_penalty", [-10, 10])
def test_the_strongest_penalties_are_within_the_range_of_floats(model, length_penalty):
    (beam,) = model.beams("a", width=2, length_penalty=length_penalty)
    assert np.isfinite(beam.score)


def test_the_block_is_used_to_its_end(model):
    assert len(model.beams("abcd", width=1)[0].tokens) <= 9  # without a number of tokens no further than that
    (beam,) = model.beams("abcd", tokens=9, width=1)
    assert np.isfinite(beam.score)
    with pytest.raises(InputError, match="--tokens 10 must be 1 to 9: a search does not go beyond the model's block"):
        model.beams("abcd", tokens=10, width=1)


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(width=0), "--beams 0 must be 1 to 64"),
        (dict(width=65), "--beams 65 must be 1 to 64"),
        (dict(width=2, best=3), "--best 3 must be 1 to --beams, which is 2"),
        (dict(length_penalty=math.nan), "--length-penalty nan"),
        (dict(length_penalty=1000), "--length-penalty 1000 must be -10 to 10"),
        (dict(length_penalty=-1e308), "--length-penalty -1e.308"),
        (dict(width="x"), "--beams 'x'"),
        (dict(best=True), "--best True"),
        (dict(tokens=0), "--tokens 0 must be 1 to 12"),
        (dict(dtype="f16"), "--dtype 'f16'"),
    ],
)
def test_a_search_that_cannot_be_is_refused_with_the_numbers(model, options, says):
    with pytest.raises(InputError, match=says):
        model.beams("a", **{"tokens": 3, "width": 2} | options)
