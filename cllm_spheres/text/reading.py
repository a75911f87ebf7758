"""One file of any kind -> its documents, written to a spool; or the reason why there are none.

The content decides, not the name: byte-order marks, UTF-8, else cp1252 for what is clearly text; then html,
.jsonl, gz, PDF and DOCX. Files are streamed: no file has to fit into memory.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np

from cllm_spheres.text.documents import HtmlText, docx_text, is_docx, is_html, pdf_text
from cllm_spheres.text.files import NotText, reason_of
from cllm_spheres.text.spool import SpoolWriter

CHUNK_BYTES = 1 << 20
Chunks = Callable[[], Iterator[bytes]]  # each call starts again at the beginning

_MARKS = (  # UTF-32 before UTF-16: its mark begins with the other's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Texts do hold bell, backspace, tab, line feeds, form feed, return and escape (colours).
_CONTROL = np.array([(b < 32 and b not in b"\a\b\t\n\v\f\r\x1b") or b == 127 for b in range(256)])
_UNDEFINED = np.isin(np.arange(256), [0x81, 0x8D, 0x8F, 0x90, 0x9D])  # in cp1252
_COMMON = np.array([chr(b).isalnum() or chr(b).isspace() for b in range(128)] + [False] * 128)
_TEXT_KEY = re.compile(r'"(text|content)"\s*:')
_MAX_CONTROL = 0.02  # random bytes have 0.09
_MAX_HIGH = 0.3  # of a cp1252 text; Cyrillic or Greek in their 8-bit sets have 0.7
_MIN_COMMON = 0.6  # letters, digits and blanks in a cp1252 text


class _NotJsonLines(Exception):
    pass


def read_file(path: str, spool: SpoolWriter, begin: int = 0, end: int | None = None) -> Counter[str]:
    """Append the documents of a file to the spool; counts of what was left out.

    `begin` and `end` are given for a .jsonl only: its lines that start in these bytes. OSError while
    writing the spool is raised, while reading it is counted.
    """
    skipped: Counter[str] = Counter()
    mark = spool.mark()

    def chunks() -> Iterator[bytes]:
        return _file_chunks(path, begin, end)

    try:
        if end is not None:
            skipped = _read_json_lines(_decoded(chunks, "utf-8"), spool, known=True)
        else:
            _read_content(path, chunks, spool, skipped)
    except NotText as reason:
        spool.abort(mark)
        skipped = Counter({str(reason): 1})
    except _ReadError as error:
        spool.abort(mark)
        skipped = Counter({reason_of(error.cause): 1})
    return skipped


class _ReadError(Exception):
    def __init__(self, cause: OSError) -> None:
        self.cause = cause


def _file_chunks(path: str, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
    """The bytes of a file; of a range: the lines that start in it."""
    try:
        with open(path, "rb") as file:
            if end is None:
                yield from _until_empty(file)
                return
            if begin > 0:
                file.seek(begin - 1)
                file.readline()
            while (here := file.tell()) < end:
                data = file.read(min(CHUNK_BYTES, end - here))
                if not data:
                    return
                last = here + len(data) >= end and not data.endswith(b"\n")
                yield data + file.readline() if last else data
    except OSError as error:
        raise _ReadError(error) from None


def _until_empty(file: BinaryIO) -> Iterator[bytes]:
    while data := file.read(CHUNK_BYTES):
        yield data


def _gz_chunks(source: Chunks) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=_ChunkFile(source()), mode="rb") as file:  # type: ignore[call-overload]
            yield from _until_empty(file)  # type: ignore[arg-type]
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise NotText("damaged gz") from None


class _ChunkFile:
    """The least that gzip needs of a file, over an iterator of chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, b""

    def read(self, size: int = -1) -> bytes:
        while size < 0 or len(self._rest) < size:
            data = next(self._chunks, b"")
            if not data:
                break
            self._rest += data
        size = len(self._rest) if size < 0 else size
        data, self._rest = self._rest[:size], self._rest[size:]
        return data


def _read_content(path: str, chunks: Chunks, spool: SpoolWriter, skipped: Counter[str], depth: int = 0) -> None:
    head = next(chunks(), b"")
    if not head:
        raise NotText("empty")
    if head.startswith(b"\x1f\x8b") and depth < 2:
        _read_content(path, lambda: _gz_chunks(chunks), spool, skipped, depth + 1)
        return
    if b"%PDF-" in head[:1024]:
        _whole(spool, pdf_text(b"".join(chunks())))
        return
    if head.startswith(b"PK\x03\x04"):
        data = b"".join(chunks()) if is_docx(head) or (depth == 0 and is_docx(path)) else b""
        if not data:
            raise NotText("binary")
        _whole(spool, docx_text(data))
        return
    _read_text(chunks, encoding_of(chunks, head), spool, skipped)


def encoding_of(chunks: Chunks, head: bytes) -> str:
    """The encoding of a text; NotText where it is binary or in none that can be told."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    if b"\0" in head or _shares(np.bincount(np.frombuffer(head, np.uint8), minlength=256))[0] > _MAX_CONTROL:
        raise NotText("binary")
    multibyte, cut_off = _is_utf8(chunks)
    if multibyte is not None and (multibyte or not cut_off):
        return "utf-8"  # a last character that was cut off is left away
    whole, broken, counts = 0, 0, np.zeros(256, np.int64)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for data in chunks():
        counts += np.bincount(np.frombuffer(data, np.uint8), minlength=256)
        text = decoder.decode(data)
        lost = text.count("\ufffd")
        broken += lost
        whole += len(text) - len(text.encode("ascii", "ignore")) - lost
    undefined = counts[_UNDEFINED].sum()
    control, high, common = _shares(counts)
    undefined = counts[_UNDEFINED].sum()
    if counts[0]:
        raise NotText("binary")
    if whole > broken or undefined or control > _MAX_CONTROL or high > _MAX_HIGH or common < _MIN_COMMON:
        raise NotText("undecodable")
    return "cp1252"


def _is_utf8(chunks: Chunks) -> tuple[bool | None, bool]:
    """Whether characters of several bytes occur (None: no UTF-8), and whether the last one is cut off."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    multibyte = False
    try:
        for data in chunks():
            multibyte |= not decoder.decode(data).isascii()
    except UnicodeDecodeError:
        return None, False
    return multibyte, bool(decoder.getstate()[0])


def _shares(counts: np.ndarray) -> tuple[float, float, float]:
    """Shares of control, of non-ASCII and of common characters in counts of bytes."""
    total = max(int(counts.sum()), 1)
    return counts[_CONTROL].sum() / total, counts[128:].sum() / total, counts[_COMMON].sum() / total


def _decoded(chunks: Chunks, encoding: str) -> Iterator[str]:
    """Texts of the chunks; what is cut off at the very end is left away."""
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    try:
        for data in chunks():
            if text := decoder.decode(data):
                if "\0" in text:
                    raise NotText("binary")
                yield text
    except UnicodeError:
        raise NotText("undecodable") from None


def _read_text(chunks: Chunks, encoding: str, spool: SpoolWriter, skipped: Counter[str]) -> None:
    head = next(_decoded(chunks, encoding), "")
    if is_html(head):
        html = HtmlText()
        for text in _decoded(chunks, encoding):
            spool.write(html.feed(text))
        spool.write(html.finish())
        _end(spool)
        return
    if _may_be_json_lines(head):
        mark = spool.mark()
        try:
            skipped.update(_read_json_lines(_decoded(chunks, encoding), spool))
            return
        except _NotJsonLines:
            spool.abort(mark)
    for text in _decoded(chunks, encoding):
        spool.write(text)
    _end(spool)


def _may_be_json_lines(head: str) -> bool:
    """Whether it is worth reading the first line, which may be very long, as JSON."""
    line, newline, _ = head.lstrip().partition("\n")
    return line.startswith("{") and bool(newline or len(head) < 1000 or _TEXT_KEY.search(line))


def _whole(spool: SpoolWriter, text: str) -> None:
    spool.write(text)
    _end(spool)


def _end(spool: SpoolWriter) -> None:
    if not spool.end():
        raise NotText("empty")


def _read_json_lines(texts: Iterator[str], spool: SpoolWriter, known: bool = False) -> Counter[str]:
    """A document a line; _NotJsonLines where the first is none, unless the file is `known` to be .jsonl."""
    skipped: Counter[str] = Counter()
    for line in _lines(texts):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            broken = False
        except (ValueError, RecursionError):
            record, broken = None, True
        text = text_of(record)
        if text is None:
            if not known:
                raise _NotJsonLines
            skipped["broken jsonl line" if broken else "jsonl line without text"] += 1
            continue
        known = True
        spool.write(text)
        if not spool.end():
            skipped["empty"] += 1
    return skipped


def text_of(record: object) -> str | None:
    """The text of a .jsonl object: its string "text", or else "content"."""
    if isinstance(record, dict):
        for key in ("text", "content"):
            if isinstance(record.get(key), str):
                return record[key]
    return None


def _lines(texts: Iterator[str]) -> Iterator[str]:
    parts: list[str] = []
    for text in texts:
        *lines, rest = text.split("\n")
        for line in lines:
            yield "".join([*parts, line])
            parts = []
        parts.append(rest)
    yield "".join(parts)


def is_json_lines(path: str) -> bool:
    """Whether a file's first line is a .jsonl object with a text: then it may be read in ranges."""
    try:
        with open(path, "rb") as file:
            line = file.readline(64 * CHUNK_BYTES)
        return text_of(json.loads(line)) is not None
    except (OSError, ValueError, RecursionError):
        return False
