"""One of our tokenizers -> tokens and merges with which llama.cpp's byte-level BPE gives the same ids.

llama.cpp splits a text as GPT-2 does, writes each byte as GPT-2's stand-in character, and merges.

    byte   no merge applies: every byte stays a token
    char   the bytes of each character of several bytes are merged, from the first on; since no byte that begins
           a character continues one, nothing is merged across characters
    bpe    as it is
    word   not possible: llama.cpp keeps white space
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from cllm_spheres.errors import InputError
from cllm_spheres.exchange.tokenizer_out import byte_vocabulary
from cllm_spheres.text.tokenizer import EOT, BpeTokenizer, ByteTokenizer, CharTokenizer, Tokenizer

_NEVER = bytes((0xFF, 0xFE))  # llama.cpp insists on a merge; these bytes are in no UTF-8


@dataclass(frozen=True)
class Vocabulary:
    """The lists of a GGUF file: a token an id, whether it is special, and merges, the first ones first."""

    tokens: list[str]
    is_control: list[bool]
    merges: list[str]


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """InputError for a tokenizer that llama.cpp has no like of."""
    if isinstance(tokenizer, BpeTokenizer):
        tokens, special, merges = _bpe(tokenizer)
    elif isinstance(tokenizer, ByteTokenizer):
        tokens, special, merges = [*byte_vocabulary(), EOT], {tokenizer.eot}, []
    elif isinstance(tokenizer, CharTokenizer):
        tokens, special, merges = _char(tokenizer)
    else:
        raise InputError(
            f"llama.cpp has no tokenizer like {tokenizer.kind}, which drops white space. Export with --to hf, or train"
            " with --tokenizer byte, char or bpe."
        )
    never = " ".join(map(_spelled, (_NEVER[:1], _NEVER[1:])))
    return Vocabulary(tokens, [i in special for i in range(len(tokens))], merges or [never])


def _char(tokenizer: CharTokenizer) -> tuple[list[str], set[int], list[str]]:
    pieces = [tokenizer.token_piece(i) for i in range(tokenizer.eot)]
    merges = [f"{_spelled(piece[:n])} {_spelled(piece[n : n + 1])}" for piece in pieces for n in range(1, len(piece))]
    return [*map(_spelled, pieces), EOT], {tokenizer.eot}, list(dict.fromkeys(merges))


def _bpe(tokenizer: BpeTokenizer) -> tuple[list[str], set[int], list[str]]:
    record = json.loads(tokenizer.library.to_str())
    if record["model"].get("ignore_merges"):
        raise InputError("This tokenizer takes whole words without merging (ignore_merges), which llama.cpp does not.")
    tokens = [""] * tokenizer.vocab_size
    for token, i in tokenizer.library.get_vocab(with_added_tokens=True).items():
        tokens[i] = token
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in record["model"]["merges"]]
    return tokens, set(tokenizer.library.get_added_tokens_decoder()), merges


_STAND_IN = {byte: character for character, byte in byte_vocabulary().items()}


def _spelled(data: bytes) -> str:
    """Bytes in GPT-2's stand-in characters."""
    return "".join(_STAND_IN[byte] for byte in data)
