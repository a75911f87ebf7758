"""The windows of evaluations: every token is scored once, with the context that was promised."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cllm_spheres.text.windows import Sliding, evaluation_windows

sizes = st.tuples(st.integers(1, 300), st.integers(1, 40)).flatmap(
    lambda pair: st.tuples(st.just(pair[0]), st.just(pair[1]), st.integers(1, pair[1]))
)


def all_windows(*size):
    sliding = Sliding(*size)
    return sliding.windows(0, sliding.count)


@given(sizes)
def test_every_token_is_scored_once_and_in_order(size):
    predictable, block_size, _ = size
    scored = [row for s, n, first in zip(*all_windows(*size), strict=True) for row in range(s + first, s + n)]
    assert scored == list(range(predictable))
    assert all(1 <= n <= block_size for n in all_windows(*size)[1])


@given(sizes)
def test_before_every_scored_token_stands_the_promised_context(size):
    _, block_size, stride = size
    for number, (start, _, first) in enumerate(zip(*all_windows(*size), strict=True)):
        assert (start, first) == (number * stride, block_size - stride if number else 0)


@given(sizes, st.integers(0, 50), st.integers(0, 50))
def test_a_range_of_windows_is_a_part_of_them_all(size, first, more):
    last = min(first + more, Sliding(*size).count)
    whole, part = all_windows(*size), Sliding(*size).windows(min(first, last), last)
    assert all((a[min(first, last) : last] == b).all() for a, b in zip(whole, part, strict=True))


@given(st.integers(2, 300), st.integers(1, 40))
def test_a_stride_of_a_whole_block_gives_the_windows_of_training(num_tokens, block_size):
    starts, lengths, firsts = all_windows(num_tokens - 1, block_size, block_size)
    pinned = evaluation_windows(num_tokens, block_size, num_tokens)
    assert (starts.tolist(), lengths.tolist()) == tuple(a.tolist() for a in pinned)
    assert not np.any(firsts)


@given(sizes, st.integers(1, 400))
def test_a_choice_of_windows_scores_no_token_twice_and_about_as_many_as_wanted(size, tokens):
    predictable, block_size, stride = size
    sliding = Sliding.about(tokens, *size)
    scored = [row for first, last in sliding.ranges() for row in range(first, last)]
    assert scored == sorted(set(scored)) and len(scored) == sliding.scored <= max(tokens, stride) + block_size
    assert set(scored) <= set(range(predictable))
    assert tokens < predictable or len(scored) == predictable
    starts, lengths, firsts = sliding.windows(0, sliding.count)
    assert scored == [
        row for s, n, first in zip(starts, lengths, firsts, strict=True) for row in range(s + first, s + n)
    ]


@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 400))
def test_by_a_stride_of_a_whole_block_the_choice_is_that_of_training(num_tokens, block_size, tokens):
    sliding = Sliding.about(tokens, num_tokens - 1, block_size, block_size)
    pinned = evaluation_windows(num_tokens, block_size, tokens)
    starts, lengths, _ = sliding.windows(0, sliding.count)
    assert (starts.tolist(), lengths.tolist()) == tuple(a.tolist() for a in pinned)
