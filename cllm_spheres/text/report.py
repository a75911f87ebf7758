"""What became of each file -> files.jsonl of a prepared folder: a JSON object a line, in reading order.

    path                        as it was found
    bytes                       of the file; 0 where it was not opened
    kind, encoding              text, html, jsonl, dialogue, pdf or docx, maybe "in gz"; how its text was encoded
    documents, tokens, part     how many were read; of both parts, end-of-text tokens included; train, val or both
    lost                        bytes that could not be decoded and became U+FFFD
    skipped                     {reason: count} of lines of a .jsonl, or documents, that were left out
    fields                      of a .jsonl that was read as plain text, because it has none of the known ones
    reason, of                  why all of the file was left out; of a duplicate the first file that has the same text

A key without a value is left out. Workers write what they read, a line a file; all is joined here, streaming.
"""

from __future__ import annotations

import bisect
import json
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cllm_spheres.text.dialogue import ASSISTANT, SPEAKERS, USER
from cllm_spheres.text.files import FileList, describe_skipped
from cllm_spheres.text.folder import REPORT
from cllm_spheres.text.jsonl import FIELDS
from cllm_spheres.text.reading import FileRead
from cllm_spheres.text.spool import ROW
from cllm_spheres.units import plural, size

MOST_REASONS = 6  # that are named with files
_NO_LOSS = frozenset({"binary", "duplicate", "empty", "hidden", "linked folder", "prepared folder", "special"})
NUM_NAMES = 3  # of files that are named for a reason

Rows = npt.NDArray[np.void]
Counts = npt.NDArray[np.int64]


@dataclass
class Summary:
    """What a manifest says of the report: sentences, and the reasons for leaving something out, the worst first.

    Each of `left_out` is {"reason", "count", "files", "bytes", "first": the first few paths}: of documents, lines of
    a .jsonl or files, and in how many files.
    """

    notes: list[str]
    left_out: list[dict[str, Any]]


def files_of(work: Path, number: int) -> Path:
    """Where the worker that fills spool file `number` writes its lines."""
    return work / f"{number}.files"


def line_of(path: str, begin: int, size: int, read: FileRead) -> str:
    """A worker's line on a file, or on the range of one that begins at byte `begin`."""
    record = {
        "path": path, "bytes": size, "kind": read.kind, "encoding": read.encoding, "documents": read.documents,
        "lost": read.lost, "skipped": read.skipped, "fields": read.fields,
        "reason": read.reason, "goes_on": begin > 0,
    }  # fmt: skip
    return json.dumps(record) + "\n"


def write_report(
    folder: Path, work: Path, num_spools: int, files: FileList, first: Counts, parts: dict[str, Rows],
    tokens: dict[str, Counts],
) -> Summary:  # fmt: skip
    """Write files.jsonl into `folder`.

    first: of each document the number of the first that is the same. parts, tokens: of train and val the rows, and how
    many tokens each has.
    """
    numbers = {name: np.ascontiguousarray(rows["file"]) for name, rows in parts.items()}
    with (folder / REPORT).open("w+b") as out:
        writer = _Writer(out, first)
        for path, reason, num_bytes in files.left_out:
            writer.add({"path": path, "bytes": num_bytes, "reason": reason, "documents": 0, "skipped": {}}, {})
        for number in range(num_spools):
            index = np.fromfile(work / f"{number}.index", ROW)
            per_part = {}
            for name, rows in parts.items():
                low, high = (int(np.searchsorted(numbers[name], number, side)) for side in ("left", "right"))
                documents = np.searchsorted(index["offset"], rows["offset"][low:high], "right") - 1
                per_part[name] = np.zeros(len(index) + 1, np.int64)
                np.add.at(per_part[name], documents + 1, tokens[name][low:high])
                per_part[name] = np.cumsum(per_part[name])
            at = 0
            with files_of(work, number).open(encoding="utf-8") as lines:
                for record in map(json.loads, lines):
                    end = at + record["documents"]
                    writer.add(record, {name: int(sums[end] - sums[at]) for name, sums in per_part.items()})
                    at = end
        return writer.finish()


@dataclass
class _Reason:
    count: int = 0
    files: int = 0
    bytes: int = 0
    first: list[str] = field(default_factory=list)


class _Writer:
    """Joins the ranges of a file, looks duplicates up, and counts for the summary."""

    def __init__(self, out: BinaryIO, first: Counts) -> None:
        self._out, self._first = out, first
        self._pending: dict[str, Any] | None = None
        self._documents = 0  # so far
        self._ends, self._places = array("q"), array("q")  # of each line: documents up to its end; where it stands
        self._reasons: dict[str, _Reason] = {}
        self._named: dict[str, list[str]] = {"dialogue": [], "fields": [], "lost": []}
        self._counted: Counter[str] = Counter()

    def add(self, record: dict[str, Any], tokens: dict[str, int]) -> None:
        """The next file, or the next range of the last one, with its tokens in each part."""
        record["per_part"] = Counter(tokens)
        if record.pop("goes_on", False) and self._pending:
            before = self._pending
            for name in ("documents", "lost"):
                before[name] += record[name]
            before["per_part"] += record["per_part"]
            before["skipped"] = Counter(before["skipped"]) + Counter(record["skipped"])
            before["reason"] = "" if before["documents"] else before["reason"] or record["reason"]
            return
        self._write()
        self._pending = record

    def finish(self) -> Summary:
        """The last line."""
        self._write()
        self._out.flush()
        order = sorted(
            self._reasons.items(), key=lambda item: (item[0] in _NO_LOSS, -item[1].bytes, -item[1].count, item[0])
        )  # fmt: skip
        left_out = [{"reason": name, **vars(reason)} for name, reason in order]
        return Summary(self._notes(), left_out)

    def _write(self) -> None:
        record = self._pending
        if record is None:
            return
        own = self._first[self._documents : self._documents + record["documents"]]
        repeated = int(np.count_nonzero(own < self._documents + np.arange(len(own))))
        if len(own) and repeated == len(own) and own[0] < self._documents:
            record["reason"], record["of"] = "duplicate", self._path_of(int(own[0]))
        elif repeated:
            record["skipped"] = Counter(record["skipped"]) + Counter({"duplicate": repeated})
        if record["skipped"] == {record["reason"]: 1}:
            record["skipped"] = {}
        per_part: Counter[str] = record.pop("per_part")
        record["tokens"] = sum(per_part.values())
        record["part"] = "both" if len(+per_part) > 1 else "".join(+per_part)
        self._documents += record["documents"]
        self._ends.append(self._documents)
        self._places.append(self._out.tell())
        self._count(record, len(own))
        kept = {name: value for name, value in record.items() if value or name in ("path", "bytes")}
        self._out.write(json.dumps(kept).encode() + b"\n")

    def _path_of(self, document: int) -> str:
        """The file of an earlier document, from its line."""
        place = self._places[bisect.bisect_right(self._ends, document)]
        end = self._out.tell()
        self._out.seek(place)
        line = self._out.readline()
        self._out.seek(end)
        return json.loads(line)["path"]

    def _count(self, record: dict[str, Any], documents: int) -> None:
        path = record["path"]
        if record["reason"] and record["reason"] not in record["skipped"]:
            self._left_out(record["reason"], documents or 1, record["bytes"], path)
        for reason, count in record["skipped"].items():
            self._left_out(reason, count, record["bytes"] if reason == record["reason"] else 0, path)
        if record.get("kind", "").startswith("dialogue"):
            self._name("dialogue", path)
        if record.get("fields"):
            self._name("fields", f"{path} ({', '.join(record['fields'][:8])})")
        if record.get("lost") and not record["reason"]:
            self._counted["lost bytes"] += record["lost"]
            self._name("lost", f"{path} ({record['lost']:,})")

    def _left_out(self, reason: str, count: int, num_bytes: int, path: str) -> None:
        entry = self._reasons.setdefault(reason, _Reason())
        entry.count += count
        entry.files += 1
        entry.bytes += num_bytes
        if len(entry.first) < NUM_NAMES:
            entry.first.append(path)

    def _name(self, what: str, name: str) -> None:
        self._counted[what] += 1
        if len(self._named[what]) < NUM_NAMES:
            self._named[what].append(name)

    def _notes(self) -> list[str]:
        notes = []
        if count := self._counted["lost"]:
            lost = plural(self._counted["lost bytes"], "byte")
            notes.append(
                f"{lost} in {plural(count, 'file')} could not be decoded and became U+FFFD: {self._list('lost')}."
            )
        if count := self._counted["dialogue"]:
            notes.append(
                f"{plural(count, 'file')} read as dialogues, written as chat and serve do ({SPEAKERS[USER]}: ...,"
                f" {SPEAKERS[ASSISTANT]}: ...): {self._list('dialogue')}."
            )
        if count := self._counted["fields"]:
            notes.append(
                f"{plural(count, 'file')} of JSON lines read as plain text, with braces and field names, because the"
                f" lines have none of the fields {', '.join(FIELDS[:-1])} or {FIELDS[-1]}: {self._list('fields')}."
            )
        return notes

    def _list(self, what: str) -> str:
        return names(self._named[what], self._counted[what])


def names(first: list[str], count: int) -> str:
    """["a", "b"], 4 -> 'a, b and 2 more'"""
    more = count - len(first)
    return ", ".join(first) + (f" and {more:,} more" if more > 0 else "")


def left_out_lines(left_out: list[dict[str, Any]], most: int = MOST_REASONS) -> list[str]:
    """["1 binary, 12 MB: a.bin", ...] of a manifest's `left_out`, the worst first."""
    lines = []
    for entry in left_out[:most]:
        what = describe_skipped({entry["reason"]: entry["count"]})[0]
        large = f", {size(entry['bytes'])}" if entry["bytes"] >= 1000 else ""
        lines.append(f"{what}{large}: {names(entry['first'], entry['files'])}")
    if more := left_out[most:]:
        lines.append(", ".join(describe_skipped({entry["reason"]: entry["count"] for entry in more})))
    return lines
