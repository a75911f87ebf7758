"""The windows of a step's batch, of an evaluation, and who owns which sequence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.text.batches import read_window, shard, window_start
from cllm_spheres.text.windows import evaluation_windows

SEED = 7


@kernel
def starts_of(seed, first, num_tokens, block_size, out_N):
    for i in range(out_N.size):
        out_N[i] = window_start(seed, first + i, num_tokens, block_size)


def starts(seed, first, count, num_tokens, block_size):
    out = np.full(count, -1)
    starts_of(seed, first, num_tokens, block_size, out)
    return out


@settings(deadline=None)
@given(
    st.integers(-(2**31), 2**31),
    st.integers(0, 50),
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(0, 39),
)
def test_every_epoch_visits_every_window_exactly_once(seed, epoch, block_size, num_windows, rest):
    num_tokens = num_windows * block_size + rest % block_size
    at = starts(seed, epoch * num_windows, num_windows, num_tokens, block_size)
    assert (at >= 0).all() and (at < num_tokens).all()
    # no token is an input twice, and only the rest is left out
    visits = np.bincount(((at[:, None] + np.arange(block_size)) % num_tokens).ravel(), minlength=num_tokens)
    assert visits.max() == 1 and visits.sum() == num_windows * block_size


def test_epochs_and_seeds_differ_in_order_and_offset():
    num_tokens, block_size, n = 10_007, 10, 1000
    epochs = [starts(seed, epoch * n, n, num_tokens, block_size) for seed in (1, 2) for epoch in range(3)]
    for i, one in enumerate(epochs):
        assert all((one == other).sum() < 20 for other in epochs[:i])
    assert len({at.min() % block_size for at in epochs}) > 1


def test_the_order_is_not_that_of_the_text():
    at = starts(SEED, 0, 1000, 10_000, 10)
    assert abs(np.corrcoef(at, np.arange(1000))[0, 1]) < 5 / np.sqrt(1000)  # five standard deviations


def test_a_corpus_of_more_tokens_than_32_bits_name_is_read_everywhere(tmp_path):
    """A sparse file of 8.6 GB that takes a few pages: windows lie in all of it, and the ring closes behind its end."""
    num_tokens, block_size = 2**32 + 12_345, 64
    at = starts(SEED, 0, 4000, num_tokens, block_size)
    assert at.min() < 0.01 * num_tokens and 0.99 * num_tokens < at.max() < num_tokens
    offsets = {
        int(starts(SEED, epoch * (num_tokens // block_size), 1, num_tokens, block_size)[0]) for epoch in range(64)
    }
    assert max(offsets) > 2**31 and len(offsets) == 64
    path = tmp_path / "train.bin"
    with path.open("wb") as file:
        file.write(np.arange(100, 200, dtype="<u2").tobytes())
        file.seek(2 * (num_tokens - 5))
        file.write(np.arange(1, 6, dtype="<u2").tobytes())
    ids = np.memmap(path, "<u2", "r")
    inputs, targets = np.zeros(8, np.int32), np.zeros(8, np.int32)
    read_window(ids.ctypes.data, 2, num_tokens, num_tokens - 5, inputs, targets)
    assert inputs.tolist() == [1, 2, 3, 4, 5, 100, 101, 102] and targets.tolist() == [*inputs[1:], 103]


def test_a_batch_is_a_function_of_seed_and_step():
    num_tokens, block_size, batch_size = 5003, 16, 12
    run = starts(SEED, 0, 60 * batch_size, num_tokens, block_size).reshape(60, batch_size)
    for step in (59, 0, 31, 30):  # in any order, alone or as a run, by sequence or by batch
        again = starts(SEED, step * batch_size, batch_size, num_tokens, block_size)
        one_by_one = [window_start(SEED, step * batch_size + b, num_tokens, block_size) for b in range(batch_size)]
        assert (again == run[step]).all() and (one_by_one == run[step]).all()


def test_the_batches_stay_what_they_were():
    # Written down once: a change here means that resumed runs go on with other data.
    assert starts(SEED, 0, 4, 1003, 10).tolist() == [187, 697, 447, 687]
    assert starts(SEED, 10**12, 4, 1003, 10).tolist() == [200, 863, 753, 963]


@pytest.mark.parametrize(("dtype", "item_bytes", "largest"), [(np.uint16, 2, 2**16 - 1), (np.uint32, 4, 2**31 - 1)])
@pytest.mark.parametrize("length", [1, 7, 20])
def test_a_window_goes_on_at_the_beginning(dtype, item_bytes, largest, length):
    corpus = (largest - np.arange(20)).astype(dtype)
    for start in range(20):
        inputs, targets = np.full(length, -1, np.int32), np.full(length, -1, np.int32)
        read_window(corpus.ctypes.data, item_bytes, corpus.size, start, inputs, targets)
        ring = np.concatenate([corpus, corpus, corpus]).astype(np.int64)
        assert (inputs == ring[start : start + length]).all()
        assert (targets == ring[start + 1 : start + 1 + length]).all()


@pytest.mark.parametrize("eval_more", [0, 1, 10**9])
@given(st.integers(2, 3000), st.integers(1, 300))
def test_the_whole_validation_part_is_predicted_exactly_once(eval_more, num_tokens, block_size):
    at, lengths = evaluation_windows(num_tokens, block_size, num_tokens - 1 + eval_more)
    assert at.dtype == lengths.dtype == np.int64
    predicted = np.concatenate([np.arange(s + 1, s + 1 + n) for s, n in zip(at, lengths, strict=True)])
    assert (predicted == np.arange(1, num_tokens)).all()
    assert (lengths >= 1).all() and (lengths[:-1] == block_size).all() and lengths[-1] <= block_size


@given(st.integers(2, 3000), st.integers(1, 300), st.integers(1, 4000))
def test_an_evaluation_never_leaves_the_validation_part(num_tokens, block_size, eval_tokens):
    assume(block_size < num_tokens)
    check_windows(num_tokens, block_size, eval_tokens)


@given(st.integers(2, 300), st.integers(1, 3000), st.integers(1, 4000))
def test_an_evaluation_never_leaves_a_validation_part_shorter_than_a_block(num_tokens, block_size, eval_tokens):
    assume(block_size >= num_tokens)
    check_windows(num_tokens, block_size, eval_tokens)


def check_windows(num_tokens, block_size, eval_tokens):
    at, lengths = evaluation_windows(num_tokens, block_size, eval_tokens)
    assert at.size == lengths.size >= 1 and (at >= 0).all() and (lengths >= 1).all()
    assert (at + lengths <= num_tokens - 1).all()  # a window's last target is the token behind it
    assert (at[1:] >= at[:-1] + lengths[:-1]).all()  # and no token is predicted twice
    assert lengths.max() <= block_size


@given(st.integers(2, 3000), st.integers(1, 300), st.integers(1, 3000))
def test_a_part_of_the_validation_is_spread_over_it(num_tokens, block_size, eval_tokens):
    assume(block_size <= eval_tokens < num_tokens - 1)
    at, lengths = evaluation_windows(num_tokens, block_size, eval_tokens)
    assert eval_tokens - block_size < lengths.sum() <= eval_tokens
    # the gaps between windows are even to one block
    gaps = np.diff(at)
    assert gaps.size == 0 or gaps.max() - gaps.min() <= block_size


@settings(deadline=None)
@given(st.integers(1, 2000), st.integers(1, 156))
def test_shards_are_contiguous_and_the_first_get_one_sequence_more(batch_size, num_spheres):
    assume(num_spheres <= batch_size)
    shards = [shard(batch_size, num_spheres, sphere) for sphere in range(num_spheres)]
    assert [first for first, _ in shards] == [sum(count for _, count in shards[:s]) for s in range(num_spheres)]
    each, more = divmod(batch_size, num_spheres)
    assert [count for _, count in shards] == [each + 1] * more + [each] * (num_spheres - more)
