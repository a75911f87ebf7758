"""Our tokenizers as a tokenizer.json: the library `tokenizers` gives the same ids and texts, for every kind."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer as LibraryTokenizer

from cllm_spheres.errors import InputError
from cllm_spheres.exchange.tokenizer_out import end_of_text, tokenizer_config, tokenizer_json
from cllm_spheres.text.tokenizer import CharTokenizer, WordTokenizer
from tests.exchange.models import TEXTS, tokenizers

KINDS = list(tokenizers())


@pytest.fixture(params=KINDS)
def both(request):
    """Ours, and the library's made from what is exported; as transformers does with split_special_tokens."""
    ours = tokenizers()[request.param]
    library = LibraryTokenizer.from_str(json.dumps(tokenizer_json(ours)))
    library.encode_special_tokens = tokenizer_config(ours, 12)["split_special_tokens"]
    return ours, library


def test_ids_and_sizes_are_the_same(both):
    ours, library = both
    assert library.get_vocab_size(with_added_tokens=True) == ours.vocab_size
    assert library.token_to_id(end_of_text(ours)) == ours.eot
    num_refused = 0
    for text in [*TEXTS, " ".join(TEXTS), "The spheres <unk> \t<unk> turn"]:
        try:
            ids = ours.encode(text)
        except InputError:
            num_refused += 1
            with pytest.raises(Exception, match="UNK"):  # the library raises bare Exception
                library.encode(text)
            continue
        assert library.encode(text).ids == ids, repr(text)
    assert num_refused < len(TEXTS) and (num_refused > 0) == (ours.kind == "char")


def test_texts_of_ids_are_the_same(both, rng):
    ours, library = both
    for _ in range(300):
        ids = rng.integers(0, ours.vocab_size, 15).tolist()
        assert library.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_all_white_space_of_python_splits_words():
    ours = tokenizers()["word"]
    library = LibraryTokenizer.from_str(json.dumps(tokenizer_json(ours)))
    for code in range(0x110000):
        if not 0xD800 <= code < 0xE000:
            text = f"The{chr(code)}spheres"
            if chr(code).isspace():
                assert library.encode(text).ids == ours.encode(text) == [0, 1], hex(code)
    rng = np.random.default_rng(1)
    for code in rng.integers(0, 0xD800, 2000).tolist():
        text = f"The{chr(code)}spheres"
        assert library.encode(text).ids == ours.encode(text), hex(code)


def test_an_end_of_text_that_is_a_word_gets_another_name():
    assert end_of_text(WordTokenizer(["a", "<|endoftext|>"])) == "<<|endoftext|>>"
    assert end_of_text(WordTokenizer(["a"])) == "<|endoftext|>"


@pytest.mark.parametrize("tokenizer", [CharTokenizer("a\ud800"), WordTokenizer(["a", "\udcff"])])
def test_half_a_character_cannot_be_written_down(tokenizer):
    with pytest.raises(InputError, match="half of a character"):
        tokenizer_json(tokenizer)


def test_a_word_twice_cannot_be_written_down():
    with pytest.raises(InputError, match="a word twice"):
        tokenizer_json(WordTokenizer(["a", "a"]))
