"""Logits with a cache of keys and values are those of the uncached pass, whatever is computed together."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from cllm_spheres.errors import InputError
from cllm_spheres.inference import decoder as D
from cllm_spheres.inference.decoder import Decoder, Rows
from cllm_spheres.kernels.products import BACKEND
from tests.check import assert_close
from tests.inference.conftest import random_model
from tests.kernels.test_strips import to_bfloat16

SHAPES = [
    dict(),
    dict(block_size=1, layers=1, heads=1, width=8),
    dict(block_size=50, layers=3, heads=3, width=66, ff_width=100, bias=False),
    dict(block_size=70, layers=1, heads=2, width=96, ff_width=33),  # heads of 48: a tile and a half
]


def new(model, **options):
    return Decoder(model.layout, model.params_P, **{"slots": 3, "dtype": "fp32", "threads": 1} | options)


def ids_of(model, seed=1):
    return np.random.default_rng(seed).integers(0, model.shape.vocab_size, model.shape.block_size)


def read(decoder, ids, slot, parts):
    """The logits behind every token of a text that is given in parts of these sizes."""
    logits, first = [], 0
    for part in parts:
        logits.append(decoder.run([Rows(slot, first, ids[first : first + part], part)]).copy())
        first += part
    assert first == len(ids)
    return np.concatenate(logits)


def ways(length):
    """Ways to read a text: in one pass, token by token, and first some together."""
    yield [length]
    yield [1] * length
    if length > 20:
        yield [17, *[1] * (length - 20), 3]


def assert_same(cached, uncached):
    if BACKEND == "avx512":
        assert np.array_equal(cached, uncached)  # every number is the same chain of operations
    else:
        assert_close(cached, uncached, 1e-5)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("sizes", SHAPES)
def test_cached_logits_are_the_uncached_ones(sizes, threads):
    model = random_model(**sizes)
    ids = ids_of(model)
    decoder, expected = new(model, threads=threads), model.logits(ids)
    for slot, parts in enumerate(ways(len(ids))):
        assert_same(read(decoder, ids, slot, parts), expected)
    decoder.close()


def test_a_pass_of_more_rows_than_a_bundle_reads_many_texts_at_once(model):
    texts = [ids_of(model, seed) for seed in range(3)]
    decoder = new(model)
    rows = [Rows(slot, 0, ids, len(ids)) for slot, ids in enumerate(texts)]
    logits = decoder.run(rows)
    for ids, some in zip(texts, np.split(logits, 3), strict=True):
        assert_same(some, model.logits(ids))
    decoder.close()


def test_a_text_does_not_depend_on_what_is_computed_with_it(model):
    ids, other = ids_of(model), ids_of(model, 2)
    alone, beside = new(model), new(model, threads=2)
    expected = read(alone, ids, 0, [1] * len(ids))
    beside.run([Rows(1, 0, other[:7], 0)])
    for position, token in enumerate(ids):
        rows = [
            Rows(1, 7 + position % 9, other[7:9]),
            Rows(0, position, [token]),
            Rows(2, 0, other[: position % 5 + 1]),
        ]
        assert np.array_equal(beside.run(rows)[1], expected[position])
    alone.close()
    beside.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_bf16_is_float32_with_rounded_weights(threads):
    model = random_model()
    embedding = model.parameters["wte.weight"]
    embedding[...] = to_bfloat16(embedding)  # as an embedding it is read in float32
    ids = ids_of(model)
    half = new(model, dtype="bf16", threads=threads)
    found = read(half, ids, 0, [1] * len(ids))
    for name, tensor in model.parameters.items():
        if tensor.ndim == 2 and name != "wpe.weight":
            tensor[...] = to_bfloat16(tensor)
    assert np.array_equal(found, read(new(model), ids, 0, [1] * len(ids)))
    half.close()


def test_a_copied_text_goes_on_like_the_first(model):
    ids = ids_of(model)
    decoder = new(model)
    expected = read(decoder, ids, 0, [1] * len(ids))
    read(decoder, ids_of(model, 5), 2, [len(ids)])
    decoder.copy(0, 2)
    assert np.array_equal(decoder.run([Rows(2, len(ids) - 1, ids[-1:])])[0], expected[-1])
    decoder.close()


def test_only_what_is_wanted_is_given(model):
    ids = ids_of(model)
    decoder = new(model)
    assert decoder.run([Rows(0, 0, ids[:5], 0)]).shape == (0, model.shape.vocab_size)
    logits = decoder.run([Rows(0, 5, ids[5:9], 2), Rows(1, 0, ids[:3], 1)])
    expected = model.logits(ids[:9])
    assert_same(logits, np.stack([expected[7], expected[8], expected[2]]))
    decoder.close()


def test_closing_ends_the_threads(model):
    before = threading.active_count()
    decoder = new(model, threads=4)
    decoder.run([Rows(0, 0, [1])])
    assert threading.active_count() == before + 3
    decoder.close()
    assert threading.active_count() == before
    decoder.close()  # again: nothing happens


def test_a_decoder_that_is_dropped_ends_its_threads(model):
    before = threading.active_count()
    decoder = new(model, threads=2)
    decoder.run([Rows(0, 0, [1])])
    del decoder
    assert threading.active_count() == before


def test_helpers_that_slept_wake_up(model):
    decoder = new(model, threads=3)
    ids = ids_of(model)
    expected = read(new(model), ids, 0, [1] * len(ids))
    for position, token in enumerate(ids):
        threading.Event().wait(0.002 * (position % 3))  # longer than they spin
        assert np.array_equal(decoder.run([Rows(0, position, [token])])[0], expected[position])
    decoder.close()


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(dtype="fp16"), "--dtype 'fp16' .* known: bf16, fp32|did you mean"),
        (dict(threads=0), "--threads 0 must be 1 to 256"),
        (dict(threads=1000), "--threads 1000"),
        (dict(slots=10**9), "Not enough memory: writing 1,000,000,000 texts at once needs .* --dtype bf16"),
    ],
)
def test_what_is_not_possible_is_refused_with_the_numbers(model, options, says):
    with pytest.raises(InputError, match=says):
        new(model, **options)


def test_a_large_model_takes_more_threads(model, monkeypatch):
    monkeypatch.setattr(D, "usable_cores", lambda: list(range(6)))
    monkeypatch.setattr(D, "BYTES_A_THREAD", 10_000)
    for dtype, threads, expected in (("fp32", None, 5), ("bf16", None, 3), ("fp32", 3, 3)):  # 53 KB in float32
        decoder = new(model, dtype=dtype, threads=threads)
        assert decoder.threads == expected
        decoder.close()
    monkeypatch.setattr(D, "BYTES_A_THREAD", 1 << 30)
    decoder = new(model, threads=None)
    assert decoder.threads == 1
