"""The order of frequency: counted, ties by id, what never occurs at the end."""

import dataclasses

import numpy as np
import pytest

from cllm_spheres.errors import InputError
from cllm_spheres.text import frequency
from cllm_spheres.text.frequency import frequency_order
from cllm_spheres.text.prepare import prepare
from cllm_spheres.text.prepared import Prepared


@pytest.fixture
def prepared(tmp_path):
    (tmp_path / "a.txt").write_text("abracadabra, a cabbage\n" * 40)
    return prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer="byte")


@pytest.mark.parametrize("together", [1, 7, 1 << 22])
def test_the_most_frequent_token_is_first_and_of_equal_ones_the_lower_id(prepared, together, monkeypatch):
    monkeypatch.setattr(frequency, "_TOGETHER", together)
    ids_V, counts_V = frequency_order(prepared)
    tokens = prepared.train.tolist()
    counts = [tokens.count(i) for i in range(257)]
    assert (ids_V.dtype, counts_V.dtype) == (np.int64, np.int64)
    assert counts_V.tolist() == counts
    assert ids_V.tolist() == sorted(range(257), key=lambda i: (-counts[i], i))
    assert chr(ids_V[0]) == "a" and counts[ids_V[-1]] == 0


def test_a_token_outside_of_the_vocabulary_is_named(prepared):
    damaged = dataclasses.replace(prepared, train=np.array([1, 300, 2], np.uint16))
    with pytest.raises(InputError, match=r"holds token 300, the vocabulary is 257"):
        frequency_order(damaged)


def test_without_tokens_the_order_is_that_of_the_ids(prepared):
    empty = dataclasses.replace(Prepared.open(prepared.folder), train=np.zeros(0, np.uint16))
    ids_V, counts_V = frequency_order(empty)
    assert ids_V.tolist() == list(range(257)) and not counts_V.any()
