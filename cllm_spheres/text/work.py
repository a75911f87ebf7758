"""One task of preparing (a plain dict) -> files in the work folder and a plain dict: what a worker runs.

Tasks say what to do by numbers and paths only, so they travel as lines of JSON. What a task writes is a
function of the task and the files it names, so it does not matter which worker runs it, or when.
"""

from __future__ import annotations

import json
import os
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cllm_spheres.errors import InputError
from cllm_spheres.text.reading import read_file
from cllm_spheres.text.report import files_of, line_of
from cllm_spheres.text.spool import ROW, Part, SpoolReader, SpoolWriter
from cllm_spheres.text.tokenizer import Tokenizer, load_tokenizer, train_bpe

Task = dict[str, Any]
Report = Callable[[int], None]  # bytes done within a long task


def run_task(task: Task, report: Report = lambda done: None) -> Task:
    """Run one task; a failure on purpose is a result with "error" or "refused"."""
    try:
        return _TASKS[task["do"]](task, report)
    except InputError as error:  # a tokenizer from elsewhere that lacks a character of this text
        return {"refused": str(error)}
    except OSError as error:
        return {"error": error.strerror or str(error), "errno": error.errno, "file": error.filename}


def _read(task: Task, report: Report) -> Task:
    """files: [path, begin, end, size] -> spool file `number`, and a line on each; counts of what was skipped."""
    work, number = Path(task["work"]), task["number"]
    spool = SpoolWriter(work, number, report)
    skipped: Counter[str] = Counter()
    with files_of(work, number).open("w", encoding="utf-8") as lines:
        for path, begin, end, size in task["files"]:
            read = read_file(path, spool, begin, end)
            skipped += read.skipped
            lines.write(line_of(path, begin, size, read))
    return {"skipped": skipped, "documents": spool.close()}


def load_part(work: Path, name: str) -> Part:
    """A part as written by `save_part`."""
    return Part(np.fromfile(work / f"{name}.rows", ROW))


def save_part(work: Path, name: str, part: Part) -> None:
    """Write a part for the workers."""
    part.rows.tofile(work / f"{name}.rows")


_readers: dict[tuple[str, str], SpoolReader] = {}
_tokenizers: dict[str, Tokenizer] = {}


def _reader(task: Task) -> SpoolReader:
    key = task["work"], task["part"]
    if key not in _readers:
        _readers[key] = SpoolReader(Path(task["work"]), load_part(Path(task["work"]), task["part"]))
    return _readers[key]


def _characters(task: Task, report: Report) -> Task:
    """The distinct characters of a range of text."""
    seen: set[str] = set()
    for text, _, _ in _reader(task).pieces(task["low"], task["high"]):
        seen.update(text)
    return {"characters": "".join(sorted(seen))}


def _words(task: Task, report: Report) -> Task:
    """Counts of the words of a range of text, in file `out`."""
    counts: Counter[str] = Counter()
    for text, _, _ in _reader(task).pieces(task["low"], task["high"]):
        counts.update(text.split())
    Path(task["out"]).write_text(json.dumps(counts))
    return {}


def _train_bpe(task: Task, report: Report) -> Task:
    """bpe trained on the `ranges` of a part, in file `out`."""
    reader = _reader(task)

    def texts() -> Iterator[str]:
        done = 0
        for low, high in task["ranges"]:
            for text, _, _ in reader.pieces(low, high):
                yield text
            done += high - low
            report(done)

    with _parallel(True):
        tokenizer = train_bpe(texts(), task["vocab_size"])
    tokenizer.save(Path(task["out"]))
    return {"vocab_size": tokenizer.vocab_size}


def _encode(task: Task, report: Report) -> Task:
    """The ids of a range of text, end of text between documents, in file `out`; their number by row in OUT.rows."""
    path = task["tokenizer"]
    if path not in _tokenizers:
        _tokenizers[path] = load_tokenizer(Path(path))
    tokenizer = _tokenizers[path]
    eot = np.array([tokenizer.eot], np.int64)
    rows, counts = array("q"), array("q")
    num_documents = 0
    with open(task["out"], "wb") as out, _parallel(False):
        for text, row, starts_document in _reader(task).pieces(task["low"], task["high"]):
            ids_N = tokenizer.encode_array(text)
            if starts_document:
                ids_N = np.concatenate([eot, ids_N])
                num_documents += 1
            rows.append(row)
            counts.append(len(ids_N))
            out.write(ids_N.astype(task["dtype"]).tobytes())
    np.array([rows, counts], np.int64).tofile(task["out"] + ".rows")
    return {"tokens": sum(counts), "documents": num_documents}


class _parallel:
    """Whether the library `tokenizers` uses its threads: for training; many encoders have processes."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = "true" if wanted else "false"

    def __enter__(self) -> None:
        self._before = os.environ.get("TOKENIZERS_PARALLELISM")
        os.environ["TOKENIZERS_PARALLELISM"] = self._wanted

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = self._before


_TASKS: dict[str, Callable[[Task, Report], Task]] = {
    "read": _read,
    "characters": _characters,
    "words": _words,
    "train_bpe": _train_bpe,
    "encode": _encode,
}


def forget(work: Path) -> None:
    """Close what `run_task` keeps open for a work folder."""
    for key in [key for key in list(_readers) if key[0] == str(work)]:
        _readers.pop(key).close()
    for path in [path for path in list(_tokenizers) if Path(path).parent in (work, work.parent)]:
        del _tokenizers[path]


def main() -> None:
    """A worker process: tasks as lines of JSON on stdin, results on stdout; ends with its parent."""
    import ctypes
    import signal

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not mix with the results
    for line in sys.stdin:
        result = run_task(json.loads(line), lambda done: print(json.dumps({"progress": done}), file=out))
        print(json.dumps(result), file=out)
