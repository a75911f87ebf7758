"""Paths named by a user -> the files to read, in sorted order, and counts of what was left out and why."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cllm_spheres.errors import InputError

# Reasons for which a file or document is left out -> how the reason reads after its count.
REASONS = {
    "hidden": "hidden",
    "binary": "binary",
    "empty": "empty",
    "undecodable": "in an encoding that was not recognised (convert them to UTF-8)",
    "duplicate": "duplicates of an earlier document",
    "no permission": "without read permission",
    "unreadable": "unreadable",
    "special": "not regular files",
    "linked folder": "linked folders",
    "prepared folder": "prepared folders",
    "damaged gz": "damaged gz files",
    "damaged pdf": "damaged or encrypted PDF files",
    "damaged docx": "damaged DOCX files",
    "damaged html": "damaged html files",
    "pdf": "PDF files skipped: pip install 'cllm-spheres[documents]'",
    "docx": "DOCX files skipped: pip install 'cllm-spheres[documents]'",
    "broken jsonl line": "broken jsonl lines",
    "jsonl line without text": "jsonl lines without a text",
    "jsonl line with another dialogue": "jsonl lines of dialogues with an unknown role or a content that is not text",
}


class NotText(Exception):
    """Why a file gives no document: a key of REASONS."""


@dataclass
class FileList:
    """Files in reading order with their sizes in bytes, and (path, reason, size) of what was left out."""

    paths: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    left_out: list[tuple[str, str, int]] = field(default_factory=list)

    @property
    def skipped(self) -> Counter[str]:
        """How many were left out, by reason."""
        return Counter(reason for _, reason, _ in self.left_out)

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes)

    def add(self, path: str, status: os.stat_result) -> None:
        """Take a regular file that is not empty; count anything else."""
        if not stat.S_ISREG(status.st_mode):
            self.left_out.append((path, "special", 0))
        elif status.st_size == 0:
            self.left_out.append((path, "empty", 0))
        else:
            self.paths.append(path)
            self.sizes.append(status.st_size)


def list_files(paths: Sequence[str | Path]) -> FileList:
    """Walk files and folders in sorted order. InputError for a path that is missing or cannot be read."""
    found = FileList()
    for path in [os.fspath(path) for path in paths]:
        try:
            status = os.stat(path)
        except OSError as error:
            raise InputError(f"Cannot read {path}: {error.strerror}. Check the path.") from None
        except ValueError as error:  # a zero byte in the name, from a file or a library's call
            raise InputError(f"Cannot read {path!r}: {error}. Check the path.") from None
        if stat.S_ISDIR(status.st_mode):
            if not os.access(path, os.R_OK | os.X_OK):
                raise InputError(f"Cannot read {path}: Permission denied.")
            _walk(path, found)
        else:
            if not os.access(path, os.R_OK):
                raise InputError(f"Cannot read {path}: Permission denied.")
            found.add(path, status)
    return found


def _walk(folder: str, found: FileList) -> None:
    pending = [folder]  # a stack of folders: a deep tree must not end in a RecursionError
    while pending:
        current = pending.pop()
        try:
            entries = sorted(os.scandir(current), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            found.left_out.append((current, reason_of(error), 0))
            continue
        if _is_prepared(entries):
            found.left_out.append((current, "prepared folder", 0))
            continue
        folders = []
        for entry in entries:
            if entry.name.startswith("."):
                found.left_out.append((entry.path, "hidden", 0))
                continue
            try:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_dir():
                    found.left_out.append((entry.path, "linked folder", 0))  # it may lead round in a circle
                else:
                    found.add(entry.path, entry.stat())
            except OSError as error:
                found.left_out.append((entry.path, reason_of(error), 0))
        pending.extend(reversed(folders))


def _is_prepared(entries: Iterable[os.DirEntry[str]]) -> bool:
    return {"manifest.json", "train.bin", "val.bin", "tokenizer.json"} <= {entry.name for entry in entries}


def reason_of(error: OSError) -> str:
    """The reason to count for a file that could not be opened or read."""
    return "no permission" if isinstance(error, PermissionError) else "unreadable"


def describe_skipped(skipped: dict[str, int]) -> list[str]:
    """["3 binary", "214 PDF files skipped: pip install ..."]: what was left out, the most frequent first."""
    order = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    return [f"{count:,} {REASONS.get(reason, reason)}" for reason, count in order if count]
