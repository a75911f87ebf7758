"""Paths to text of any kind -> a prepared folder: train.bin, val.bin, tokenizer.json, manifest.json.

    prepare(["books", "notes.txt"], "prepared/books", tokenizer="bpe", vocab_size=4096)

Read and decode every file into a spool, drop duplicates, split, make the tokenizer, encode. Every stage
streams in units whose borders depend on the text alone: the output is the same bytes for any number of
processes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cllm_spheres.errors import InputError
from cllm_spheres.machine import usable_cores
from cllm_spheres.text import folder
from cllm_spheres.text.embedded import embedded_files, embedded_name
from cllm_spheres.text.files import FileList, describe_skipped, list_files
from cllm_spheres.text.jsonl import is_json_lines
from cllm_spheres.text.pool import Pool, Report
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.text.report import write_report
from cllm_spheres.text.split import split_documents
from cllm_spheres.text.spool import Part, read_index
from cllm_spheres.text.tokenizer import load_tokenizer
from cllm_spheres.text.vocabulary import check_vocabulary, make_tokenizer
from cllm_spheres.text.work import Task, forget, save_part

Progress = Callable[[str, float, float], None]  # stage, done, total (bytes)
STAGES = ("read", "vocabulary", "tokens")
# The first of them only where text is looked for in the cache; shares of the time, about, with bpe.
SHARES = {"look": 0.05, "read": 0.2, "vocabulary": 0.35, "tokens": 0.4}
STAGE_NAMES = {
    "look": "Comparing with what is prepared", "read": "Reading", "vocabulary": "Making the vocabulary",
    "tokens": "Encoding",
}  # fmt: skip

READ_BYTES = 8 << 20  # files read by one task
READ_FILES = 1000
JSONL_BYTES = 32 << 20  # a larger .jsonl is read in ranges of this
UNIT_BYTES = 4 << 20  # text encoded by one task
INLINE_BYTES = 2 << 20  # below, starting processes takes longer than the work
BYTES_PER_PROCESS = 1 << 20  # of input files; more processes are not started


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a prepared folder, besides the text."""

    tokenizer: str = "bpe"
    vocab_size: int | None = None
    val_fraction: float = 0.1
    exact: bool = True  # a vocab_size that the text cannot give is an error; else the most it gives is taken
    given: bytes | None = None  # a tokenizer.json to take instead of making one

    def check(self) -> None:
        """InputError where these settings cannot work with any text."""
        check_vocabulary(self.tokenizer, self.vocab_size)
        if not 0 <= self.val_fraction < 1:
            raise InputError(f"--val-fraction {self.val_fraction:g}: give 0 or more and less than 1.")


def prepare(
    paths: Sequence[str | Path] | None,
    out: str | Path,
    *,
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    val_fraction: float = 0.1,
    processes: int | None = None,
    progress: Progress | None = None,
    given: bytes | None = None,
) -> Prepared:
    """Prepare files and folders of text (None: the embedded corpus) into the folder `out`.

    `vocab_size` is for bpe (default 1024, or what the text gives) and word (default: all, at most 65,536).
    given: a tokenizer.json, instead of `tokenizer` and `vocab_size`.
    `processes` defaults to the usable cores; it does not change a byte. Needs free disk of about the text
    plus its tokens. InputError for bad input; whatever happens, `out` is either untouched or whole.
    """
    settings = Settings(tokenizer, vocab_size, val_fraction, given=given)
    settings.check()
    if isinstance(paths, str | Path):
        paths = [paths]
    out = Path(out)
    folder.check_target(out)
    files, sources = find(paths)
    return prepare_files(files, sources, out, settings, processes=processes, progress=progress)


def find(paths: Sequence[str | Path] | None) -> tuple[FileList, list[str]]:
    """The files to read, and what the text is called: those of `paths`, or for None the embedded corpus."""
    if paths is None:
        return embedded_files(), [embedded_name()]
    return list_files(paths), list(map(str, paths))


def prepare_files(
    files: FileList,
    sources: list[str],
    out: Path,
    settings: Settings,
    *,
    processes: int | None = None,
    progress: Progress | None = None,
    keep_existing: bool = False,
) -> Prepared:
    """Prepare listed files. With `keep_existing` a folder that another process made meanwhile is taken."""
    if processes is not None and processes < 1:
        raise InputError(f"--processes {processes}: give 1 or more.")
    if not files.paths:
        raise no_text(sources, files.skipped)
    num_processes = processes or len(usable_cores())
    if files.total_bytes < INLINE_BYTES:
        num_processes = 0
    num_processes = min(num_processes, 1 + files.total_bytes // BYTES_PER_PROCESS)
    with folder.building(out) as temporary:
        try:
            with Pool(num_processes) as pool:
                _Preparation(pool, temporary, progress).run(files, sources, settings)
            folder.publish(temporary, out, keep_existing=keep_existing)
        except OSError as error:
            raise InputError(_cannot_write(out, error)) from None
        finally:
            forget(temporary / "work")
    return Prepared.open(out)


def no_text(sources: list[str], skipped: dict[str, int]) -> InputError:
    """The error for a corpus without text, with what was left out."""
    why = ", ".join(describe_skipped(skipped)) or "no files"
    return InputError(f"No text found in {', '.join(sources)}: {why}.")


def _cannot_write(out: Path, error: OSError) -> str:
    message = f"Cannot prepare into {out}: {error.strerror or error}."
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        message += " It needs about the size of the text and of its tokens (2 or 4 bytes each) at once."
    return message + " Give another folder: cllm-spheres prepare PATH --out DIR."


class _Preparation:
    """One run of `prepare` in the folder `temporary`; its `work` folder holds the spool."""

    def __init__(self, pool: Pool, temporary: Path, progress: Progress | None) -> None:
        self.pool, self.temporary, self.work = pool, temporary, temporary / "work"
        self.progress = progress or (lambda stage, done, total: None)
        self.work.mkdir()

    def run(self, files: FileList, sources: list[str], settings: Settings) -> None:
        rows, first, num_tasks, skipped = self.read(files)
        if not len(rows):
            raise no_text(sources, skipped)
        train, val = split_documents(rows, settings.val_fraction, self.work)
        parts = {"train": train, "val": val}
        for name, part in parts.items():
            save_part(self.work, name, part)
        ranges = {name: list(_units(part)) for name, part in parts.items()}
        if settings.given is not None:
            (self.temporary / "tokenizer.json").write_bytes(settings.given)
            tokenizer = load_tokenizer(self.temporary / "tokenizer.json")
            notes: list[str] = []
        else:
            tokenizer, notes = make_tokenizer(
                settings.tokenizer, settings.vocab_size, settings.exact, self.work, train, ranges, self.run_tasks
            )
            tokenizer.save(self.temporary / "tokenizer.json")
        dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
        self.total, self.done = sum(part.size for part in parts.values()), 0
        self.row_tokens = {name: np.zeros(len(part.rows), np.int64) for name, part in parts.items()}
        counts = {name: self.encode(name, part, ranges[name], dtype) for name, part in parts.items()}
        summary = write_report(
            self.temporary, self.work, num_tasks, files, first, {name: part.rows for name, part in parts.items()},
            self.row_tokens,
        )  # fmt: skip
        shutil.rmtree(self.work)
        tokens = sum(count["tokens"] for count in counts.values())
        manifest: dict[str, Any] = {
            "format": folder.FORMAT,
            "version": folder.VERSION,
            "tokenizer": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "eot": tokenizer.eot,
            "dtype": {"<u2": "uint16", "<u4": "uint32"}[dtype],
            "documents": len(rows),
            "bytes": self.total,
            "tokens": tokens,
            "bytes_per_token": self.total / tokens,
            "train": {key: counts["train"][key] for key in ("documents", "bytes", "tokens")},
            "val": {key: counts["val"][key] for key in ("documents", "bytes", "tokens")},
            "val_fraction": settings.val_fraction,
            "cut": len(train.rows) + len(val.rows) - len(rows),
            "skipped": dict(sorted(skipped.items())),
            "left_out": summary.left_out,
            "notes": [*summary.notes, *notes],
            "sources": sources,
            "report": folder.entry_of(self.temporary / folder.REPORT),
            "files": {
                name: folder.entry_of(self.temporary / name, counts.get(Path(name).stem, {}).get("sha256"))
                for name in folder.FILES
            },
        }
        folder.write_manifest(self.temporary, manifest)

    def read(self, files: FileList) -> tuple[np.ndarray, np.ndarray, int, Counter[str]]:
        """All files into the spool: what `read_index` gives, the number of spool files, and what was left out."""
        tasks = list(_read_tasks(files, str(self.work)))
        skipped = files.skipped
        read = np.zeros(len(tasks), np.int64)  # bytes of each task
        sizes = [task["bytes"] for task in tasks]

        def report(number: int, done: int) -> None:
            read[number] = min(done, sizes[number])
            self.progress("read", int(read.sum()), files.total_bytes)

        self.progress("read", 0, files.total_bytes)
        for number, result in enumerate(self.results(tasks, report)):
            skipped.update(result["skipped"])
            report(number, sizes[number])
        rows, first = read_index(self.work, len(tasks))
        skipped["duplicate"] += len(first) - len(rows)
        return rows, first, len(tasks), +skipped

    def encode(self, name: str, part: Part, ranges: list[tuple[int, int]], dtype: str) -> dict[str, Any]:
        """One part into its .bin; its counts and sha256."""
        tasks: list[Task] = [
            {"do": "encode", "work": str(self.work), "part": name, "low": low, "high": high, "dtype": dtype,
             "tokenizer": str(self.temporary / "tokenizer.json"), "out": str(self.work / f"{name}-{i}.ids")}
            for i, (low, high) in enumerate(ranges)
        ]  # fmt: skip
        tokens, documents, digest = 0, int(bool(tasks)), hashlib.sha256()
        self.progress("tokens", self.done, self.total)
        with (self.temporary / f"{name}.bin").open("wb") as out:
            for task, result in zip(tasks, self.results(tasks), strict=True):
                data = Path(task["out"]).read_bytes()
                os.unlink(task["out"])
                rows, row_tokens = np.fromfile(f"{task['out']}.rows", np.int64).reshape(2, -1)
                np.add.at(self.row_tokens[name], rows, row_tokens)
                os.unlink(f"{task['out']}.rows")
                out.write(data)
                digest.update(data)
                tokens += result["tokens"]
                documents += result["documents"]
                self.done += task["high"] - task["low"]
                self.progress("tokens", self.done, self.total)
        return {
            "documents": documents,
            "bytes": part.size,
            "tokens": tokens,
            "sha256": digest.hexdigest(),
        }

    def run_tasks(self, tasks: list[Task], stage: str) -> Iterator[Task]:
        """Results of tasks over ranges of text, with progress."""
        total = sum(high - low for task in tasks for low, high in _ranges_of(task))
        before = 0
        self.progress(stage, 0, total)
        results = self.results(tasks, lambda number, done: self.progress(stage, before + done, total))
        for task, result in zip(tasks, results, strict=True):
            before += sum(high - low for low, high in _ranges_of(task))
            self.progress(stage, before, total)
            yield result

    def results(self, tasks: list[Task], report: Report | None = None) -> Iterator[Task]:
        """Results in order; OSError where a worker met one, InputError where a given tokenizer lacks a character."""
        for result in self.pool.map(tasks, report):
            if "refused" in result:
                raise InputError(result["refused"])
            if "error" in result:
                raise OSError(result["errno"], result["error"])
            yield result


def _ranges_of(task: Task) -> list[tuple[int, int]]:
    return task["ranges"] if "ranges" in task else [(task["low"], task["high"])]


def _units(part: Part) -> Iterator[tuple[int, int]]:
    size = part.size
    for low in range(0, size, UNIT_BYTES):
        yield low, min(low + UNIT_BYTES, size)


def _read_tasks(files: FileList, work: str) -> Iterator[Task]:
    """Groups of files of about READ_BYTES; a large .jsonl becomes several ranges."""
    pending: list[tuple[str, int, int | None, int]] = []
    size, number = 0, 0

    def task() -> Task:
        return {"do": "read", "work": work, "number": number, "files": pending, "bytes": size}

    for path, bytes_ in zip(files.paths, files.sizes, strict=True):
        step = JSONL_BYTES if bytes_ > 2 * JSONL_BYTES and is_json_lines(path) else bytes_
        for begin in range(0, bytes_, step):
            end = min(begin + step, bytes_) if step < bytes_ else None
            pending.append((path, begin, end, bytes_))
            size += min(step, bytes_ - begin)
            if size >= READ_BYTES or len(pending) >= READ_FILES:
                yield task()
                pending, size, number = [], 0, number + 1
    if pending:
        yield task()
