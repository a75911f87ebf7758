"""Decoded documents -> plain UTF-8 files and an index on disk; ranges of that text -> pieces to tokenize.

Everything after reading works on this spool, so a PDF is parsed once and a file that changes meanwhile does
no harm. Where text is cut depends on the text alone, never on the number of processes.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

PIECE_BYTES = 256 << 10  # text handed to a tokenizer in one call: bounds its memory
REPORT_BYTES = 8 << 20  # between two words on how far a long file is
CUT_WINDOW = 4 << 10  # how far a cut may move back to find white space

# One row a document: 128 bits of its hash, its place, its length in bytes.
ROW = np.dtype([("hash", "<u8"), ("hash_low", "<u8"), ("file", "<u4"), ("offset", "<u8"), ("size", "<u8")])


class SpoolWriter:
    """Writes documents one after another; a document that turns out unusable is taken back."""

    def __init__(self, folder: Path, number: int, report: Callable[[int], None] | None = None) -> None:
        self.number = number
        self._report, self._reported = report, 0
        self._file: BinaryIO = (folder / f"{number}.txt").open("wb")
        self._index = folder / f"{number}.index"
        self._rows = array("Q")  # five numbers a document: hash, hash_low, file, offset, size
        self._start = 0
        self._hash = hashlib.blake2b(digest_size=16)
        self._blank = True

    def write(self, text: str) -> None:
        """Append to the open document."""
        data = text.encode("utf-8", "replace")
        self._hash.update(data)
        self._file.write(data)
        self._blank = self._blank and not text.strip()
        if self._report and self._file.tell() >= self._reported + REPORT_BYTES:
            self._reported = self._file.tell()
            self._report(self._reported)

    def end(self) -> bool:
        """Close the document; False (and nothing kept) where it was only white space."""
        if self._blank:
            self.abort()
            return False
        end = self._file.tell()
        digest = self._hash.digest()
        high, low = (int.from_bytes(half, "big") for half in (digest[:8], digest[8:]))
        self._rows.extend((high, low, self.number, self._start, end - self._start))
        self._begin(end)
        return True

    def mark(self) -> int:
        """A point to which `abort` can return."""
        return len(self._rows)

    def count_since(self, mark: int) -> int:
        """Documents that were ended since `mark`."""
        return (len(self._rows) - mark) // 5

    def abort(self, mark: int | None = None) -> None:
        """Forget the open document, and all documents ended since `mark`."""
        if mark is not None and mark < len(self._rows):
            self._start = self._rows[mark + 3]
            del self._rows[mark:]
        self._file.seek(self._start)
        self._file.truncate()
        self._begin(self._start)

    def close(self) -> int:
        """Write the index; the number of documents."""
        self._file.close()
        columns = np.array(self._rows, np.uint64).reshape(-1, 5)
        rows = np.empty(len(columns), ROW)
        for i, name in enumerate(("hash", "hash_low", "file", "offset", "size")):
            rows[name] = columns[:, i]
        rows.tofile(self._index)
        return len(rows)

    def _begin(self, start: int) -> None:
        self._start = start
        self._hash = hashlib.blake2b(digest_size=16)
        self._blank = True


def read_index(folder: Path, num_files: int) -> tuple[npt.NDArray[np.void], npt.NDArray[np.int64]]:
    """Rows of all documents in reading order without exact duplicates.

    And of every document the number of the first one that is the same, which is its own for those that are kept.
    """
    rows = np.concatenate([np.zeros(0, ROW), *(np.fromfile(folder / f"{i}.index", ROW) for i in range(num_files))])
    order = np.lexsort((rows["hash_low"], rows["hash"]))  # stable: the first of equals stays first
    high, low = rows["hash"][order], rows["hash_low"][order]
    begins = np.ones(len(rows), bool)
    begins[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    first = np.empty(len(rows), np.int64)
    first[order] = order[np.maximum.accumulate(np.where(begins, np.arange(len(rows)), 0))]
    return rows[first == np.arange(len(rows))], first


@dataclass(frozen=True)
class Part:
    """The training or the validation part: documents, or pieces of documents, laid end to end."""

    rows: npt.NDArray[np.void]

    @property
    def size(self) -> int:
        """Bytes of text."""
        return int(self.rows["size"].sum(dtype=np.int64))

    def starts(self) -> npt.NDArray[np.int64]:
        """Where each row begins in the text laid end to end, and where the last one ends."""
        return np.concatenate([[0], np.cumsum(self.rows["size"], dtype=np.int64)])


class SpoolReader:
    """Reads ranges of a part as pieces of text."""

    def __init__(self, folder: Path, part: Part) -> None:
        self.folder, self.part = folder, part
        self.starts = part.starts()
        self._file: tuple[int, BinaryIO] | None = None

    def pieces(self, low: int, high: int) -> Iterator[tuple[str, int, bool]]:
        """The text of about [low, high) in pieces: (text, row, whether it begins a row after the first).

        Inner borders move back to white space; ranges that touch give every byte exactly once.
        """
        first = int(np.searchsorted(self.starts, low, "right")) - 1
        last = int(np.searchsorted(self.starts, high, "left"))
        for d in range(first, last):
            begin, end = self._edge(d, low), self._edge(d, high)
            starts_here = begin == 0 and d > 0
            here = begin
            while here < end:
                nominal = ((here + CUT_WINDOW) // PIECE_BYTES + 1) * PIECE_BYTES
                there = end if nominal >= end else self.cut(d, nominal)
                yield self.read(d, here, there).decode("utf-8", "replace"), d, starts_here
                starts_here = False
                here = there

    def cut(self, d: int, nominal: int) -> int:
        """Where to cut row d, at most CUT_WINDOW before byte `nominal`.

        After a new line, else before a blank, else between two characters. It never decreases with `nominal`.
        """
        low = max(0, nominal - CUT_WINDOW)
        window = self.read(d, low, nominal + 1)
        newline = window.rfind(b"\n", 0, -1)
        if newline >= 0:
            return low + newline + 1
        blank = max(window.rfind(b" ", 0, -1), window.rfind(b"\t", 0, -1))
        if blank >= 0:
            return low + blank
        while nominal > 0 and window[nominal - low] & 0xC0 == 0x80:
            nominal -= 1
        return nominal

    def _edge(self, d: int, position: int) -> int:
        """A position in the text laid end to end -> the byte of row d at which to begin or end."""
        start, end = int(self.starts[d]), int(self.starts[d + 1])
        if position <= start or position >= end:
            return min(max(position, start), end) - start
        return self.cut(d, position - start)

    def read(self, d: int, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of row d, or fewer at its end."""
        row = self.part.rows[d]
        number = int(row["file"])
        if self._file is None or self._file[0] != number:
            self.close()
            self._file = number, (self.folder / f"{number}.txt").open("rb")
        end = min(end, int(row["size"]))
        return os.pread(self._file[1].fileno(), end - begin, int(row["offset"]) + begin)

    def close(self) -> None:
        if self._file is not None:
            self._file[1].close()
            self._file = None
