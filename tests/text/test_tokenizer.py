"""Tokenizers: round trips for any text, and what they refuse."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_spheres.errors import InputError
from cllm_spheres.text.tokenizer import (
    EOT,
    ByteTokenizer,
    CharTokenizer,
    StreamDecoder,
    WordTokenizer,
    load_tokenizer,
    train_bpe,
)

SAMPLE = "The naïve kissing spheres, 球, touch; the 12 around the one do not. 🙂\n\tindented\r\n" * 20
BPE = train_bpe([SAMPLE], 320)
BYTE = ByteTokenizer()
WORD = WordTokenizer(["a", "bb", "ccc"])
any_text = st.text() | st.text(alphabet="<|endoftx> \n\té球🙂")
any_ids = st.lists(st.integers(-5, 400))


@given(any_text)
def test_byte_and_bpe_give_any_text_back(text):
    for tokenizer in (BYTE, BPE):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(type(i) is int for i in ids)


@given(any_text)
def test_char_gives_any_text_of_its_own_characters_back(text):
    tokenizer = CharTokenizer(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(set(text)) + 1


@given(any_text)
def test_word_gives_the_words_back_with_single_spaces(text):
    tokenizer = WordTokenizer(sorted(set(text.split())))
    assert tokenizer.decode(tokenizer.encode(text)) == " ".join(text.split())


@given(any_ids)
def test_decode_never_raises(ids):
    for tokenizer in (BYTE, BPE, WORD, CharTokenizer("abc")):
        assert isinstance(tokenizer.decode(ids), str)


@given(any_ids)
def test_streaming_says_the_same_as_decoding_at_once(ids):
    for tokenizer in (BYTE, BPE, WORD, CharTokenizer("aé")):
        stream = StreamDecoder(tokenizer)
        assert "".join([*map(stream.feed, ids), stream.finish()]) == tokenizer.decode(ids)


@given(any_text)
def test_streaming_never_shows_a_broken_character(text):
    for tokenizer in (BYTE, BPE):
        stream, shown = StreamDecoder(tokenizer), ""
        for token in tokenizer.encode(text):
            shown += stream.feed(token)
            assert text.startswith(shown)


@given(any_text)
def test_token_bytes_add_up_to_the_bytes_of_the_text(text):
    for tokenizer in (BYTE, BPE, CharTokenizer(text)):
        token_bytes = tokenizer.token_bytes()
        assert token_bytes.dtype == np.int32 and token_bytes.shape == (tokenizer.vocab_size,)
        assert token_bytes[tokenizer.eot] == 0
        assert token_bytes[tokenizer.encode(text)].sum() == len(text.encode())


def test_word_has_no_bytes_per_token():
    assert WORD.token_bytes() is None


@pytest.mark.parametrize("tokenizer", [BYTE, BPE, CharTokenizer(EOT), WordTokenizer([EOT])])
def test_the_literal_end_of_text_is_only_text(tokenizer):
    ids = tokenizer.encode(EOT)
    assert tokenizer.eot not in ids and tokenizer.decode(ids) == EOT


def test_end_of_text_is_the_last_id_and_decodes_to_nothing():
    for tokenizer in (BYTE, BPE, WORD, CharTokenizer("ab")):
        assert tokenizer.eot == tokenizer.vocab_size - 1
        assert tokenizer.decode([tokenizer.eot]) == ""
    assert BYTE.eot == 256


def test_a_word_that_is_unknown_becomes_the_unknown_token():
    assert WORD.encode("bb zz a") == [1, WORD.unknown, 0]
    assert WORD.decode([1, WORD.unknown, 0]) == "bb <unk> a"


def test_a_character_that_is_unknown_is_named():
    with pytest.raises(InputError, match=r"vocabulary of 4 has no 'x', 'é'"):
        CharTokenizer("abc").encode("éaxb")


@pytest.mark.parametrize("tokenizer", [BYTE, BPE, WORD, CharTokenizer('aé"\n球\ud800')], ids=lambda t: t.kind)
def test_saved_tokenizers_load_as_they_were(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert (loaded.kind, loaded.vocab_size, loaded.eot) == (
        tokenizer.kind,
        tokenizer.vocab_size,
        tokenizer.eot,
    )
    assert [loaded.token_piece(i) for i in range(loaded.vocab_size)] == [
        tokenizer.token_piece(i) for i in range(tokenizer.vocab_size)
    ]


def test_the_bpe_file_is_read_by_the_library_itself(tmp_path):
    import tokenizers

    BPE.save(tmp_path / "tokenizer.json")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.encode("the naïve spheres").ids == BPE.encode("the naïve spheres")
    assert library.token_to_id(EOT) == BPE.eot


def test_bpe_needs_no_more_than_the_bytes(tmp_path):
    smallest = train_bpe([SAMPLE], 257)
    assert smallest.vocab_size == 257 and smallest.decode(smallest.encode(SAMPLE)) == SAMPLE


@settings(max_examples=20)
@given(st.binary(max_size=300))
def test_a_damaged_tokenizer_file_is_bad_input(data):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_bytes(data)
        with pytest.raises(InputError):
            load_tokenizer(path)


@pytest.mark.parametrize(
    "record", [[], {}, {"kind": "bite"}, {"kind": "char"}, {"model": {}}, {"model": {"type": "BPE"}}, None]
)
def test_a_tokenizer_file_of_something_else_is_bad_input(record, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(record))
    with pytest.raises(InputError):
        load_tokenizer(path)
    with pytest.raises(InputError, match="No such file"):
        load_tokenizer(tmp_path / "none.json")


@pytest.mark.parametrize(
    "part",
    [
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "?"}},
        {"truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 7}},
        {"padding": {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                     "pad_type_id": 0, "pad_token": "x"}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "Prepend", "prepend": "x"}},
        {"added_tokens": []},
    ],
)  # fmt: skip
def test_a_library_file_of_another_kind_is_refused_before_it_meets_a_text(part, tmp_path):
    train_bpe(["some text"], 260).save(tmp_path / "tokenizer.json")
    record = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(record | part))
    with pytest.raises(InputError, match=f"{next(iter(part))} are not those of a byte-level BPE"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("record", [{"kind": "word", "words": ["a", 5]}, {"kind": "char", "characters": ["ab"]}])
def test_words_and_characters_that_are_no_text_are_refused(record, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="damaged"):
        load_tokenizer(tmp_path / "tokenizer.json")
