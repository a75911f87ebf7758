"""What a caller in Python hands over as text -> paths to read.

A str or a Path is a path; an iterable of Paths is several files or folders; an iterable of str is the texts themselves,
each a document.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from cllm_spheres.errors import InputError, shown

LONGEST_NAME = 4096  # characters; a longer text is no path


@contextlib.contextmanager
def as_paths(data: Any) -> Iterator[Path | list[Path] | None]:
    """The paths of `data`, while inside: texts are written to a file, which is removed afterwards.

    None stays None. InputError where data are neither paths nor texts.
    """
    if data is None or isinstance(data, str | os.PathLike):
        yield as_path(data, "data")
        return
    if isinstance(data, Mapping | bytes | bytearray) or not isinstance(data, Iterable):
        raise InputError(f"data is {shown(data)}, {_kind(data)}: {_WANTED}")
    items = iter(data)
    try:
        first = next(items)
    except StopIteration:
        raise InputError(f"data is {shown(data)}, which holds nothing: {_WANTED}") from None
    if isinstance(first, os.PathLike):
        yield [_item(item, number, os.PathLike, "a Path") for number, item in enumerate(chain([first], items))]
        return
    if isinstance(first, str) and len(first) < LONGEST_NAME and _exists(first):
        raise InputError(
            f"data[0] is {shown(first)}, the name of a file: a str in a list is the text itself. Give Path({first!r})"
            " for the file."
        )
    try:
        temporary = tempfile.TemporaryDirectory(prefix="cllm-spheres-")
    except OSError as error:
        raise _cannot_write("a temporary folder", error) from None
    with temporary as folder:
        path = Path(folder) / "texts-from-python.jsonl"
        _write(path, (_item(item, number, str, "a str") for number, item in enumerate(chain([first], items))))
        yield [path]


_WANTED = (
    "give a path (str or Path) of text or of a prepared folder, a list of Paths for several, or a list or an iterator"
    " of str for the texts themselves."
)


def as_path(path: Any, name: str) -> Path | None:
    """A path that was given as str or Path, or None; InputError for anything else."""
    if path is not None and not isinstance(path, str | os.PathLike):
        raise InputError(f"{name} is {shown(path)}, {_kind(path)}: give a path, as str or Path.")
    return None if path is None else Path(path)


def as_folder(path: Any, name: str = "run") -> Path:
    """A path that has to be given; InputError where it is none."""
    folder = as_path(path, name)
    if folder is None:
        raise InputError(f"{name} is None: give a path, as str or Path.")
    return folder


def _write(path: Path, texts: Iterator[str]) -> None:
    """One JSON object a line. What the caller's iterator raises goes through."""
    try:
        file = path.open("w", encoding="ascii")
    except OSError as error:
        raise _cannot_write(path, error) from None
    try:
        for text in texts:
            try:
                file.write(json.dumps({"text": text}) + "\n")
            except OSError as error:
                raise _cannot_write(path, error) from None
    finally:
        try:
            file.close()  # writes what is still buffered, for short texts all of it
        except OSError as error:
            raise _cannot_write(path, error) from None


def _cannot_write(path: Path | str, error: OSError) -> InputError:
    return InputError(
        f"The texts cannot be written to {path} while they are prepared: {error.strerror}. Free some space, or let"
        " TMPDIR name another folder."
    )


def _item(item: Any, number: int, kind: type, what: str) -> Any:
    if not isinstance(item, kind):
        others = f", where data[0] is {what}" if number else ""
        raise InputError(f"data[{number}] is {shown(item)}, {_kind(item)}{others}: {_WANTED}")
    if isinstance(item, str):
        try:
            item.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"data[{number}] is {shown(item)}: it is not Unicode, it holds half a surrogate pair."
            ) from None
    return Path(item) if isinstance(item, os.PathLike) else item


def _kind(value: Any) -> str:
    return "of type " + type(value).__name__


def _exists(text: str) -> bool:
    try:
        return bool(text) and os.path.exists(text)
    except ValueError:  # a zero byte
        return False
