"""The bytes of a text file -> its encoding, and its text with what cannot be decoded replaced by U+FFFD.

A byte-order mark decides; else UTF-8; else, for what is clearly text, cp1252, or UTF-8 with cp1252 between, as in logs
of several programs. A thousandth of the bytes may be damaged: they are replaced and counted.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cllm_spheres.text.files import NotText

Chunks = Callable[[], Iterator[bytes]]  # each call starts again at the beginning

MOST_LOST = 0.001  # share of a text's bytes that may not be decoded
MIXED = "utf-8 with cp1252"
_MARKS = (  # UTF-32 before UTF-16: its mark begins with the other's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Texts do hold bell, backspace, tab, line feeds, form feed, return and escape (colours).
_CONTROL = np.array([(b < 32 and b not in b"\a\b\t\n\v\f\r\x1b") or b == 127 for b in range(256)])
_NOT_CP1252 = (0x81, 0x8D, 0x8F, 0x90, 0x9D)
_UNDEFINED = np.isin(np.arange(256), _NOT_CP1252)
# In cp1252 no letter, quotation mark, dash or common sign: hardly meant where it stands alone between ASCII.
_SIGNS = b"\x85\x91\x92\x93\x94\x95\x96\x97\xa0\xa3\xa7\xa9\xab\xae\xb0\xbb"
_IMPLAUSIBLE = np.array([b > 127 and b not in _SIGNS and not 0xC0 <= b <= 0xFD for b in range(256)])
_COMMON = np.array([chr(b).isalnum() or chr(b).isspace() for b in range(128)] + [False] * 128)
_MAX_CONTROL = 0.02  # random bytes have 0.09
_MAX_HIGH = 0.3  # of a cp1252 text; Cyrillic or Greek in their 8-bit sets have 0.7
_MIN_COMMON = 0.6  # letters, digits and blanks in a cp1252 text
_MIN_ZEROS = 0.6  # of the upper bytes of UTF-16 in a European language

# While decoding, a byte b that cannot be decoded is the character U+DC00 + b, which no encoding gives.
_ESCAPE = "cllm_spheres.escape"
_LOST = re.compile("[\0\udc00-\udcff]")


@dataclass(frozen=True)
class Encoding:
    """How a text is encoded, and how many of its bytes are not and become U+FFFD."""

    name: str
    lost: int = 0


def encoding_of(chunks: Chunks, head: bytes) -> Encoding:
    """The encoding of a text; NotText where it is binary or in none that can be told."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return _marked(chunks, name)
    if _shares(_counts(head))[0] > _MAX_CONTROL:
        if name := _utf16_without_mark(head):
            return _marked(chunks, name)
        raise NotText("binary")
    return _utf8(chunks) or _eight_bits(chunks)


def decoded(chunks: Chunks, encoding: Encoding) -> Iterator[str]:
    """The text, chunk by chunk; a character that is cut off at the very end is left away."""
    if encoding.name == MIXED:
        for text in _escaped(chunks, "utf-8"):
            yield _LOST.sub(lambda found: _as_cp1252(ord(found[0])), text)
    elif encoding.lost:
        for text in _escaped(chunks, encoding.name):
            yield _LOST.sub("\ufffd", text)
    else:
        decoder = codecs.getincrementaldecoder(encoding.name)("strict")
        try:
            for data in chunks():
                if text := decoder.decode(data):
                    yield text
        except UnicodeError:  # the file has changed since its encoding was found
            raise NotText("undecodable") from None


def _escape(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(chr(0xDC00 + b) for b in error.object[error.start : error.end]), error.end


codecs.register_error(_ESCAPE, _escape)


def _as_cp1252(code: int) -> str:
    """The character of an escaped byte, or of a zero."""
    return bytes([code - 0xDC00]).decode("cp1252", "replace") if code else "\ufffd"


def _escaped(chunks: Chunks, name: str) -> Iterator[str]:
    errors = "surrogateescape" if name.startswith(("utf-8", "cp")) else _ESCAPE  # the first is quicker, for bytes
    decoder = codecs.getincrementaldecoder(name)(errors)
    for data in chunks():
        if text := decoder.decode(data):
            yield text


def _marked(chunks: Chunks, name: str) -> Encoding:
    """A text whose encoding is known."""
    lost = total = 0
    width = {"utf-16": 2, "utf-32": 4}.get(name[:6], 1)
    for text in _escaped(chunks, name):
        zeros = text.count("\0")
        lost += len(text) - len(text.encode("utf-8", "ignore").decode()) + width * zeros
        total += width * len(text)
    if lost > MOST_LOST * total:
        raise NotText("undecodable")
    return Encoding(name, lost)


def _utf16_without_mark(head: bytes) -> str:
    """utf-16-le or utf-16-be where every other byte is zero, as in European languages; else ""."""
    even, odd = (np.frombuffer(head, np.uint8)[at : len(head) // 2 * 2 : 2] for at in (0, 1))
    for name, upper, lower in (("utf-16-le", odd, even), ("utf-16-be", even, odd)):
        if len(upper) and (upper == 0).mean() >= _MIN_ZEROS:
            control, _, common = _shares(np.bincount(lower[upper == 0], minlength=256))
            if control <= _MAX_CONTROL and common >= _MIN_COMMON:
                return name
    return ""


def _utf8(chunks: Chunks) -> Encoding | None:
    """UTF-8, apart from some zeros; None where it is not, or may as well be cp1252."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    multibyte, zeros, total = False, 0, 0
    try:
        for data in chunks():
            multibyte |= not decoder.decode(data).isascii()
            zeros += data.count(0)
            total += len(data)
    except UnicodeDecodeError:
        return None
    if decoder.getstate()[0] and not multibyte:
        return None  # the last letter of a cp1252 text rather than the first byte of one that was cut off
    if zeros > MOST_LOST * total:
        raise NotText("binary")
    return Encoding("utf-8", zeros)


def _eight_bits(chunks: Chunks) -> Encoding:
    """UTF-8 with damaged bytes, cp1252, or both in one file."""
    counts = np.zeros(256, np.int64)
    whole = broken = stray = 0  # characters beyond ASCII, bytes that are not UTF-8, those that are not cp1252 either
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    for data in chunks():
        counts += _counts(data)
        text = decoder.decode(data)
        kept = text.encode("utf-8", "ignore").decode()
        broken += len(text) - len(kept)
        stray += sum(text.count(chr(0xDC00 + byte)) for byte in _NOT_CP1252)
        whole += len(kept) - len(kept.encode("ascii", "ignore"))
    broken += len(decoder.getstate()[0]) * (not whole)
    total, zeros, undefined = int(counts.sum()), int(counts[0]), int(counts[_UNDEFINED].sum())
    control, high, common = _shares(counts)
    if zeros > MOST_LOST * total or control > _MAX_CONTROL:
        raise NotText("binary")
    rare_accents = not whole and not counts[_IMPLAUSIBLE].sum()
    if broken + zeros <= MOST_LOST * total and not rare_accents:
        return Encoding("utf-8", broken + zeros)
    if whole > broken:
        if stray + zeros > MOST_LOST * total:
            raise NotText("undecodable")
        return Encoding(MIXED, stray + zeros)
    if undefined + zeros > MOST_LOST * total or high > _MAX_HIGH or common < _MIN_COMMON:
        raise NotText("undecodable")
    return Encoding("cp1252", undefined + zeros)


def _counts(data: bytes) -> npt.NDArray[np.int64]:
    return np.bincount(np.frombuffer(data, np.uint8), minlength=256)


def _shares(counts: npt.NDArray[np.int64]) -> tuple[float, float, float]:
    """Shares of control, of non-ASCII and of common characters in counts of bytes."""
    total = max(int(counts.sum()), 1)
    return counts[_CONTROL].sum() / total, counts[128:].sum() / total, counts[_COMMON].sum() / total
