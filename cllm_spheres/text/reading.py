"""One file of any kind -> its documents, written to a spool; or the reason why there are none.

The content decides, not the name: text in some encoding, and in it html and .jsonl; gz, PDF and DOCX. Files are
streamed: no file has to fit into memory.
"""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from cllm_spheres.text.documents import HtmlText, docx_text, is_docx, is_html, pdf_text
from cllm_spheres.text.encoding import Chunks, Encoding, decoded, encoding_of
from cllm_spheres.text.files import NotText, reason_of
from cllm_spheres.text.jsonl import NotJsonLines, may_be_json_lines, read_json_lines, unknown_fields
from cllm_spheres.text.spool import SpoolWriter

CHUNK_BYTES = 1 << 20


@dataclass
class FileRead:
    """What was read from a file: `documents` of them, or, with none, the `reason`."""

    kind: str = ""
    encoding: str = ""
    lost: int = 0  # bytes that could not be decoded
    documents: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # what was left out, by reason
    fields: list[str] = field(default_factory=list)  # of a .jsonl whose objects have no known one
    reason: str = ""


def read_file(path: str, spool: SpoolWriter, begin: int = 0, end: int | None = None) -> FileRead:
    """Append the documents of a file to the spool.

    `begin` and `end` are given for a .jsonl only: its lines that start in these bytes. OSError while
    writing the spool is raised, while reading it is counted.
    """
    read = FileRead()
    mark = spool.mark()

    def chunks() -> Iterator[bytes]:
        return _file_chunks(path, begin, end)

    try:
        if end is not None:
            encoding = encoding_of(chunks, next(chunks(), b""))
            read.encoding, read.lost = encoding.name, encoding.lost
            read.kind, read.skipped = read_json_lines(decoded(chunks, encoding), spool, known=True)
        else:
            _read_content(path, chunks, spool, read)
    except NotText as reason:
        spool.abort(mark)
        read.reason = str(reason)
    except _ReadError as error:
        spool.abort(mark)
        read.reason = reason_of(error.cause)
    read.documents = spool.count_since(mark)
    if read.reason:
        read.skipped = Counter({read.reason: 1})
    elif not read.documents:
        read.reason = max(read.skipped, key=lambda reason: read.skipped[reason], default="empty")
    return read


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


def _read_content(path: str, chunks: Chunks, spool: SpoolWriter, read: FileRead, depth: int = 0) -> None:
    head = next(chunks(), b"")
    if not head:
        raise NotText("empty")
    if head.startswith(b"\x1f\x8b") and depth < 2:
        _read_content(path, lambda: _gz_chunks(chunks), spool, read, depth + 1)
        read.kind += " in gz"
        return
    if b"%PDF-" in head[:1024]:
        read.kind = "pdf"
        _whole(spool, pdf_text(b"".join(chunks())))
        return
    if head.startswith(b"PK\x03\x04"):
        data = b"".join(chunks()) if is_docx(head) or (depth == 0 and is_docx(path)) else b""
        if not data:
            raise NotText("binary")
        read.kind = "docx"
        _whole(spool, docx_text(data))
        return
    encoding = encoding_of(chunks, head)
    read.encoding, read.lost = encoding.name, encoding.lost
    _read_text(path, chunks, encoding, spool, read)


def _read_text(path: str, chunks: Chunks, encoding: Encoding, spool: SpoolWriter, read: FileRead) -> None:
    head = next(decoded(chunks, encoding), "")
    if is_html(head):
        read.kind = "html"
        html = HtmlText()
        for text in decoded(chunks, encoding):
            spool.write(html.feed(text))
        spool.write(html.finish())
        _end(spool)
        return
    if may_be_json_lines(head):
        mark = spool.mark()
        try:
            read.kind, read.skipped = read_json_lines(decoded(chunks, encoding), spool)
            return
        except NotJsonLines:
            spool.abort(mark)
            read.fields = unknown_fields(head, path)
    read.kind = "text"
    for text in decoded(chunks, encoding):
        spool.write(text)
    _end(spool)


def _whole(spool: SpoolWriter, text: str) -> None:
    spool.write(text)
    _end(spool)


def _end(spool: SpoolWriter) -> None:
    if not spool.end():
        raise NotText("empty")
