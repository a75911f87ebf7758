"""The windows of evaluations: every token is scored once, with the context that was promised."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cllm_spheres.text.windows import evaluation_windows, num_sliding_windows, sliding_windows

sizes = st.tuples(st.integers(1, 300), st.integers(1, 40)).flatmap(
    lambda pair: st.tuples(st.just(pair[0]), st.just(pair[1]), st.integers(1, pair[1]))
)


def all_windows(predictable, block_size, stride):
    return sliding_windows(predictable, block_size, stride, 0, num_sliding_windows(predictable, block_size, stride))


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
    last = min(first + more, num_sliding_windows(*size))
    whole, part = all_windows(*size), sliding_windows(*size, min(first, last), last)
    assert all((a[min(first, last) : last] == b).all() for a, b in zip(whole, part, strict=True))


@given(st.integers(2, 300), st.integers(1, 40))
def test_a_stride_of_a_whole_block_gives_the_windows_of_training(num_tokens, block_size):
    starts, lengths, firsts = all_windows(num_tokens - 1, block_size, block_size)
    pinned = evaluation_windows(num_tokens, block_size, num_tokens)
    assert (starts.tolist(), lengths.tolist()) == tuple(a.tolist() for a in pinned)
    assert not np.any(firsts)
