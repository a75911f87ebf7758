"""A prepared folder -> its tokens as the crystal numbers them: counts, text that is safe to show, one by its name."""

# V vocabulary

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from cllm_spheres.errors import InputError, shown
from cllm_spheres.text.frequency import frequency_order
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.text.tokenizer import EOT

SPACE = "\u2423"  # an open box, so that the space before a word is seen
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", " ": SPACE}


def visible(piece: bytes) -> str:
    """The text of a token with nothing in it that moves the cursor: other bytes and control characters as escapes."""
    text = "".join(map(_visible_character, piece.decode("utf-8", "backslashreplace")))
    return "\u25cc" + text if text and unicodedata.combining(text[0]) else text


def _visible_character(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    return character if character.isprintable() else character.encode("unicode_escape").decode()


@dataclass(frozen=True)
class Corpus:
    """Tokens by number, 1 the most frequent: a number is a rank + 1."""

    prepared: Prepared
    ids_V: npt.NDArray[np.int64]  # by rank
    counts_V: npt.NDArray[np.int64]  # by rank

    @classmethod
    def of(cls, prepared: Prepared) -> Corpus:
        ids_V, counts_V = frequency_order(prepared)
        return cls(prepared, ids_V, counts_V[ids_V])

    @property
    def size(self) -> int:
        """Number of tokens in the vocabulary, and so the largest number."""
        return len(self.ids_V)

    @cached_property
    def shares_V(self) -> npt.NDArray[np.float64]:
        """The share of the training part that each rank has."""
        return self.counts_V / max(1, int(self.counts_V.sum()))

    @cached_property
    def heat_V(self) -> npt.NDArray[np.float64]:
        """How frequent each rank is, from 0 (never) to 1 (the most frequent), by the logarithm of its count."""
        return np.log1p(self.counts_V) / (np.log1p(self.counts_V[0]) or 1.0)

    def id_of(self, number: int) -> int:
        return int(self.ids_V[number - 1])

    def label(self, number: int) -> str:
        """What the token of a number looks like."""
        return self._label_of_id(self.id_of(number))

    def _label_of_id(self, i: int) -> str:
        tokenizer = self.prepared.tokenizer
        return visible(tokenizer.token_piece(i)) or (EOT if i == tokenizer.eot else f"<{i}>")

    def find(self, token: str) -> int:
        """The number of the token with this text, this look, or this id, tried in this order; InputError for none."""
        tokenizer = self.prepared.tokenizer
        if not token:
            raise InputError("--token is empty: give the text of a token, or its id.")
        piece = token.encode("utf-8", "surrogateescape" if _is_escaped(token) else "replace")
        found = [i for i in range(self.size) if i != tokenizer.eot and tokenizer.token_piece(i) == piece]
        found = found or [i for i in range(self.size) if self._label_of_id(i) == token]
        if not found and token.isascii() and token.isdigit():
            if len(token) > 18 or int(token) >= self.size:
                raise InputError(
                    f"There is no token {shown(token)[1:-1]}: the vocabulary has {self.size:,} tokens, with ids "
                    f"0 to {self.size - 1:,}."
                )
            found = [int(token)]
        if not found:
            raise InputError(f"{shown(token)} is no token of this vocabulary of {self.size:,}{self._parts(token)}.")
        return int(np.flatnonzero(self.ids_V == found[0])[0]) + 1

    def _parts(self, token: str) -> str:
        """What the tokenizer makes of a text that is no token."""
        tokenizer = self.prepared.tokenizer
        ids = tokenizer.encode(token)  # char: InputError that names the character
        if tokenizer.kind == "word" or not ids:
            return f"; give one of its tokens, or an id from 0 to {self.size - 1:,}"
        parts = " ".join(f"{self._label_of_id(i)} ({i})" for i in ids[:8])
        return f" but {len(ids)} of them: {parts}{' ...' if len(ids) > 8 else ''}. Give one of these, or its id"


def _is_escaped(text: str) -> bool:
    """Whether all that has no UTF-8 in a text are bytes that Python took for such."""
    return all(not "\ud800" <= c <= "\udfff" or "\udc80" <= c <= "\udcff" for c in text)
