"""The text of a .jsonl file -> the documents of its lines: a text each, or a dialogue."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from cllm_spheres.text.dialogue import dialogue_of, is_dialogue
from cllm_spheres.text.spool import SpoolWriter

FIELDS = ("text", "content", "messages", "prompt and completion")
FIRST_LINE_BYTES = 64 << 20  # a longer first line is not read as JSON
_KNOWN = re.compile(r'"(text|content|messages|prompt|completion)"\s*:')


class NotJsonLines(Exception):
    """The first line is no object with a text."""


def may_be_json_lines(head: str) -> bool:
    """Whether it is worth reading the first line, which may be very long, as JSON."""
    line, newline, _ = head.lstrip().partition("\n")
    return line.startswith("{") and bool(newline or len(head) < 1000 or _KNOWN.search(line))


def read_json_lines(texts: Iterator[str], spool: SpoolWriter, known: bool = False) -> tuple[str, Counter[str]]:
    """A document a line -> "jsonl" or "dialogue", as most lines are, and what was left out.

    NotJsonLines where the first line is none, unless the file is `known` to be .jsonl.
    """
    skipped: Counter[str] = Counter()
    dialogues = documents = 0
    for line in _lines(texts):
        if not line.strip():
            continue
        try:
            record, broken = json.loads(line), False
        except (ValueError, RecursionError):
            record, broken = None, True
        if not known and not has_text(record):
            raise NotJsonLines
        known = True
        text, reason = text_of(record)
        if text is None:
            skipped["broken jsonl line" if broken else reason] += 1
            continue
        spool.write(text)
        if spool.end():
            documents += 1
            dialogues += reason == "dialogue"
        else:
            skipped["empty"] += 1
    return "dialogue" if 2 * dialogues > documents else "jsonl", skipped


def has_text(record: object) -> bool:
    """Whether an object has one of the fields that are read."""
    if not isinstance(record, dict):
        return False
    counts_messages = not isinstance(record.get("messages", []), list)  # as statistics of a forum do
    return _plain(record) is not None or (is_dialogue(record) and not counts_messages)


def text_of(record: object) -> tuple[str | None, str]:
    """The text of an object, and "text" or "dialogue"; None, and the reason why it has none."""
    if isinstance(record, dict):
        if (text := _plain(record)) is not None:
            return text, "text"
        if is_dialogue(record):
            text = dialogue_of(record)
            return text, "dialogue" if text is not None else "jsonl line with another dialogue"
    return None, "jsonl line without text"


def _plain(record: dict[str, Any]) -> str | None:
    return next((record[key] for key in ("text", "content") if isinstance(record.get(key), str)), None)


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
            return has_text(json.loads(file.readline(FIRST_LINE_BYTES)))
    except (OSError, ValueError, RecursionError):
        return False


def unknown_fields(head: str, path: str) -> list[str]:
    """The fields of a file that looks like .jsonl and is read as plain text, because it has none of FIELDS."""
    lines = [line for line in head.split("\n", 3)[:3] if line.strip()][:2]
    try:
        records = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        records = []
    is_named = path.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson"))
    if not records or not all(isinstance(record, dict) for record in records) or not (is_named or len(records) > 1):
        return []
    return list(records[0])
