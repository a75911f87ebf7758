"""One of our tokenizers -> the tokenizer.json and tokenizer_config.json that Hugging Face's libraries read.

byte   byte-level BPE without merges
char   one word a character; a character that is not in the vocabulary is an error there too
word   words between Python's white space; decoded with single spaces
bpe    as it is
"""

from __future__ import annotations

import json
from typing import Any

from cllm_spheres.errors import InputError
from cllm_spheres.text.tokenizer import (
    BYTE_OF,
    EOT,
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    WordTokenizer,
)

# str.split() of Python, all of it: the library's own idea of white space lacks U+001C to U+001F.
WHITE_SPACE = (
    r"[\x{09}-\x{0D}\x{1C}-\x{20}\x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}]+"
)
ANY_CHARACTER = r"[\s\S]"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def byte_vocabulary() -> dict[str, int]:
    """GPT-2's stand-in for each byte -> the byte, in the order of the bytes."""
    return dict(sorted(BYTE_OF.items(), key=lambda item: item[1]))


def end_of_text(tokenizer: Tokenizer) -> str:
    """How the end-of-text token is spelled: a word of that spelling may be in the vocabulary already."""
    return _free(EOT, tokenizer.words) if isinstance(tokenizer, WordTokenizer) else EOT


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json. InputError where a vocabulary cannot be written down."""
    if isinstance(tokenizer, BpeTokenizer):
        return json.loads(tokenizer.library.to_str())
    eot = end_of_text(tokenizer)
    if isinstance(tokenizer, ByteTokenizer):
        vocab = {**byte_vocabulary(), eot: tokenizer.eot}
        model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                 "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                 "vocab": vocab, "merges": []}  # fmt: skip
        return _record(eot, tokenizer.eot, BYTE_LEVEL, BYTE_LEVEL, model)
    if isinstance(tokenizer, CharTokenizer):
        _check_utf8(tokenizer.characters)
        vocab = {character: i for i, character in enumerate(tokenizer.characters)}
        split = _split(ANY_CHARACTER, "Isolated")
        return _record(eot, tokenizer.eot, split, {"type": "Fuse"}, _words(vocab, "no character is unknown"))
    assert isinstance(tokenizer, WordTokenizer)
    unknown, decoder = WordTokenizer.UNKNOWN, None
    if unknown in tokenizer.words:  # a text spelled it: the unknown word needs another name, which no word can have
        unknown = "\t" + unknown
        back = {"type": "Replace", "pattern": {"String": unknown}, "content": WordTokenizer.UNKNOWN}
        decoder = {"type": "Sequence", "decoders": [back, {"type": "WordPiece", "prefix": "\n", "cleanup": False}]}
    _check_utf8("".join(tokenizer.words))
    vocab = {word: i for i, word in enumerate(tokenizer.words)} | {unknown: tokenizer.unknown}
    if len(vocab) != tokenizer.eot:
        raise InputError(
            "The word vocabulary has a word twice, which no tokenizer.json can hold. Prepare the text anew."
        )
    return _record(eot, tokenizer.eot, _split(WHITE_SPACE, "Removed"), decoder, _words(vocab, unknown))


def tokenizer_config(tokenizer: Tokenizer, block_size: int) -> dict[str, Any]:
    """tokenizer_config.json: a text is only text, as here, even where it spells a special token.

    The unknown word is no special token there: decoding writes it, as here.
    """
    eot = end_of_text(tokenizer)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": eot, "eos_token": eot, "pad_token": eot,
        "model_max_length": block_size, "clean_up_tokenization_spaces": False, "split_special_tokens": True,
    }  # fmt: skip


def _record(eot: str, eot_id: int, split: Any, decoder: Any, model: dict[str, Any]) -> dict[str, Any]:
    added = {"id": eot_id, "content": eot, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [added], "normalizer": None,
        "pre_tokenizer": split, "post_processor": None, "decoder": decoder, "model": model,
    }  # fmt: skip


def _split(pattern: str, behavior: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def _words(vocab: dict[str, int], unknown: str) -> dict[str, Any]:
    return {"type": "WordLevel", "vocab": vocab, "unk_token": unknown}


def _free(name: str, words: list[str]) -> str:
    """The name, changed until no word is spelled like it."""
    taken = set(words)
    while name in taken:
        name = f"<{name}>"
    return name


def _check_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"The vocabulary holds {text[error.start]!r}, half of a character. Prepare the text anew."
        ) from None
