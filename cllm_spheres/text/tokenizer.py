"""Text -> token ids, and back: bytes, characters, words, or byte-level BPE.

Every tokenizer has `kind`, `vocab_size`, `eot` (the end-of-text token: the last id, unless a bpe came from elsewhere),
`encode`, `decode`, `token_bytes` and `save`. No text, whatever it contains, encodes to `eot`: it only ever separates
documents.
"""

# V vocabulary, N tokens

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from cllm_spheres.errors import InputError, nearest, shown
from cllm_spheres.text.folder import read_regular

KINDS = ("byte", "char", "word", "bpe")
EOT = "<|endoftext|>"
MIN_BPE = 257  # 256 bytes and the end-of-text token
REPLACEMENT = "\ufffd"
_FORMAT = "cllm-spheres tokenizer 1"


class Tokenizer:
    """What all tokenizers share. `encode_array` is the fast form of `encode`: int64 [N]."""

    kind: ClassVar[str]
    vocab_size: int
    eot: int

    def encode_array(self, text: str) -> npt.NDArray[np.int64]:
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; for char, InputError where a character is not in the vocabulary."""
        return self.encode_array(text).tolist()

    def token_piece(self, token: int) -> bytes:
        """The UTF-8 bytes that one token stands for: b"" for eot, U+FFFD for an id that does not exist."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; never raises. Bytes that are no UTF-8 become U+FFFD, eot becomes nothing."""
        return b"".join(map(self.token_piece, ids)).decode("utf-8", "replace")

    def token_bytes(self) -> npt.NDArray[np.int32] | None:
        """Bytes of text per token, int32 [V], 0 for eot; None for word, which loses the white space."""
        return np.array([len(self.token_piece(i)) for i in range(self.vocab_size)], np.int32)

    def save(self, path: Path) -> None:
        """Write tokenizer.json."""
        record = {"format": _FORMAT, "kind": self.kind, "vocab_size": self.vocab_size, **self._fields()}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def _fields(self) -> dict[str, Any]:
        return {}


class ByteTokenizer(Tokenizer):
    """One token a byte of UTF-8, and 256 as end of text: V = 257, the same for every text."""

    kind = "byte"
    vocab_size = 257
    eot = 256

    def encode_array(self, text: str) -> npt.NDArray[np.int64]:
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int64)

    def token_piece(self, token: int) -> bytes:
        return bytes((token,)) if 0 <= token < 256 else _no_text(token, self.eot)


class CharTokenizer(Tokenizer):
    """One token a Unicode character of the prepared text, in code point order, then end of text."""

    kind = "char"

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = "".join(sorted(set(characters)))
        self.eot = len(self.characters)
        self.vocab_size = self.eot + 1
        self._pieces = [c.encode("utf-8", "replace") for c in self.characters]
        codes = _code_points(self.characters)
        self._lookup = np.full(int(codes.max(initial=0)) + 2, -1, np.int64)  # the last entry is "unknown"
        self._lookup[codes] = np.arange(len(codes))

    def encode_array(self, text: str) -> npt.NDArray[np.int64]:
        codes = _code_points(text)
        ids_N = self._lookup[np.minimum(codes, len(self._lookup) - 1)]
        if ids_N.min(initial=0) < 0:
            unknown = sorted({text[i] for i in np.flatnonzero(ids_N < 0)[:1000]})
            shown = ", ".join(map(repr, unknown[:8]))
            raise InputError(
                f"The char vocabulary of {self.vocab_size} has no {shown}: it holds only characters of the "
                f"prepared text. Leave them out, or prepare with --tokenizer byte or bpe."
            )
        return ids_N

    def token_piece(self, token: int) -> bytes:
        return self._pieces[token] if 0 <= token < self.eot else _no_text(token, self.eot)

    def _fields(self) -> dict[str, Any]:
        return {"characters": self.characters}


class WordTokenizer(Tokenizer):
    """One token a word between white space; then the unknown token and end of text. Decodes with spaces."""

    kind = "word"
    UNKNOWN = "<unk>"

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self.unknown = len(self.words)
        self.eot = self.unknown + 1
        self.vocab_size = self.eot + 1
        self._ids = {word: i for i, word in enumerate(self.words)}

    def encode_array(self, text: str) -> npt.NDArray[np.int64]:
        get, unknown = self._ids.get, self.unknown
        return np.array([get(word, unknown) for word in text.split()], np.int64)

    def token_piece(self, token: int) -> bytes:
        if token == self.unknown:
            return self.UNKNOWN.encode()
        if 0 <= token < self.unknown:
            return self.words[token].encode("utf-8", "replace")
        return _no_text(token, self.eot)

    def decode(self, ids: Iterable[int]) -> str:
        """Words joined by one space; never raises."""
        pieces = (self.token_piece(i) for i in ids if i != self.eot)
        return b" ".join(pieces).decode("utf-8", "replace")

    def token_bytes(self) -> None:
        return None

    def _fields(self) -> dict[str, Any]:
        return {"words": self.words}


class BpeTokenizer(Tokenizer):
    """Byte-level BPE of the library `tokenizers`; tokenizer.json is the library's own format."""

    kind = "bpe"

    def __init__(self, library_tokenizer: Any) -> None:
        self.library = library_tokenizer
        self.library.encode_special_tokens = True  # a literal <|endoftext|> in a text is only text
        self.vocab_size = self.library.get_vocab_size(with_added_tokens=True)
        eot = self.library.token_to_id(EOT)
        if eot is None:
            raise InputError(f"The bpe tokenizer has no {EOT} token; prepare the text anew.")
        self.eot = eot
        self._pieces = [b""] * self.vocab_size
        for token, i in self.library.get_vocab(with_added_tokens=True).items():
            self._pieces[i] = _piece_of(token)
        for i in self.library.get_added_tokens_decoder():
            self._pieces[i] = b""

    def encode_array(self, text: str) -> npt.NDArray[np.int64]:
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate has no bytes
        return np.array(self.library.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int64)

    def token_piece(self, token: int) -> bytes:
        return self._pieces[token] if 0 <= token < self.vocab_size else _no_text(token, self.eot)

    def save(self, path: Path) -> None:
        self.library.save(str(path), pretty=True)


def train_bpe(texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
    """Byte-level BPE of `vocab_size` tokens, end of text included, or fewer where the texts give no more.

    The result does not depend on the number of threads: pairs of equal count are merged in id order.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as LibraryTokenizer

    library = LibraryTokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    library.add_special_tokens([AddedToken(EOT, special=True, normalized=False)])
    return BpeTokenizer(library)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json; InputError where it is missing or damaged."""
    try:
        return parse_tokenizer(read_regular(path), str(path))
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from None


def parse_tokenizer(data: bytes, name: str) -> Tokenizer:
    """The tokenizer that a tokenizer.json holds; InputError, which calls it `name`, where it is damaged."""
    try:
        text = data.decode()
        record = json.loads(text)
        if "model" in record:
            from tokenizers import Tokenizer as LibraryTokenizer

            _check_library_format(record)
            return BpeTokenizer(LibraryTokenizer.from_str(text))
        kind = record["kind"]
        if kind == "byte":
            return ByteTokenizer()
        if kind == "char":
            characters = record["characters"]
            if not isinstance(characters, str):
                raise TypeError(f"its characters are {shown(characters)}")
            return CharTokenizer(characters)
        if kind == "word":
            words = record["words"]
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise TypeError(f"its words are {shown(words)}")
            return WordTokenizer(words)
    except InputError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{name} is damaged ({error}); prepare the text anew.") from None
    raise InputError(f"{name} is for a tokenizer {shown(kind)}: {nearest(str(kind), KINDS)}")


def _check_library_format(record: dict[str, Any]) -> None:
    """ValueError where a file of the library is not of the kind that `train_bpe` makes.

    The library reads many other kinds, some of which end the process, or never end, as they meet a text.
    """
    model, pre_tokenizer, added = record["model"], record.get("pre_tokenizer"), record.get("added_tokens")
    wrong = [name for name in ("truncation", "padding", "normalizer", "post_processor") if record.get(name) is not None]
    if not isinstance(pre_tokenizer, dict) or pre_tokenizer.get("type") != "ByteLevel":
        wrong.append("pre_tokenizer")
    # Special tokens are never found in a text; one that is not special would be.
    special = [a.get("content") for a in added or () if isinstance(a, dict) and a.get("special") is True]
    if not isinstance(added, list) or len(special) != len(added) or EOT not in special:
        wrong.append("added_tokens")
    absent = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or any(model.get(name) for name in absent):
        wrong.append("model")
    if wrong:
        raise ValueError(f"its {' and '.join(wrong)} are not those of a byte-level BPE with {EOT}")


class StreamDecoder:
    """Ids one by one -> the text that is complete so far, with no broken UTF-8 in between.

    All that `feed` and the final `finish` return, joined, is `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        """before: the ids that stand before the text, which a word is parted from by a space."""
        self.tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = all(token == tokenizer.eot for token in before)

    def feed(self, token: int) -> str:
        """The text that became complete with this token; "" while a character is still open."""
        piece = self.tokenizer.token_piece(token)
        if self.tokenizer.kind == "word" and token != self.tokenizer.eot:
            piece = piece if self._first else b" " + piece
            self._first = False
        return self._decoder.decode(piece)

    @property
    def unfinished(self) -> bytes:
        """The bytes so far of a character that is still open."""
        return self._decoder.getstate()[0]

    def finish(self) -> str:
        """What is left: U+FFFD where the last character never became whole."""
        return self._decoder.decode(b"", final=True)


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _no_text(token: int, eot: int) -> bytes:
    return b"" if token == eot else REPLACEMENT.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte -> the byte."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_alphabet()


def _piece_of(token: str) -> bytes:
    try:
        return bytes(BYTE_OF[c] for c in token)
    except KeyError:
        return token.encode("utf-8", "replace")
