"""A folder of runs -> a record of each: where it stands and what it takes on the disk."""

from __future__ import annotations

import json
import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cllm_spheres.checkpoint.lock import is_held
from cllm_spheres.checkpoint.store import Store
from cllm_spheres.errors import InputError
from cllm_spheres.events import PREPARING, Record
from cllm_spheres.watch.records import cross_entropy_of, number, step_of

STEPS_OF_SPEED = 100  # the last steps, whose tokens and seconds are "tokens/s"
STEP_LINE = b'{"kind":"step"'
SPHERES_LINE = b'{"kind":"spheres"'
# How a run that is not held by a process has ended, by its last event.
ENDS = {"done": "finished", "early_stop": "stopped early", "failed": "failed"}
UNREADABLE = "unreadable"  # its metrics.jsonl, of another user
DIED = "cut off"  # it has ended without a word: killed, or the machine went down


@dataclass(frozen=True)
class Overview:
    """A run. What is not known is None; losses are nats a token."""

    name: str
    path: str
    state: str  # preparing text, running, finished, stopped early, stopped, failed, cut off, unreadable, or imported
    step: int | None
    steps: int | None  # of the schedule
    loss: float | None  # the plain cross-entropy of the last step
    val_loss: float | None  # of the last evaluation
    best_val_loss: float | None
    tokens_per_s: float | None  # of its last steps
    total_tokens: int | None
    size_bytes: int  # of all files in its folder
    changed: float  # Unix time of the last record


def overviews(folder: Path) -> list[Overview]:
    """The runs in a folder, the one that changed last at the end; InputError where the folder cannot be read."""
    try:
        entries = [entry for entry in folder.iterdir() if is_run(entry)]
    except FileNotFoundError:
        raise InputError(f"There is no folder {folder}. Name the one that your runs are in.") from None
    except OSError as error:
        raise InputError(f"Cannot read {folder}: {error.strerror}.") from None
    return sorted(map(overview, entries), key=lambda run: (run.changed, run.name))


def is_run(path: Path) -> bool:
    """Whether this is the folder of a run, an imported one too."""
    try:
        return any((path / name).is_file() for name in ("metrics.jsonl", "config.toml")) or bool(Store(path).steps())
    except OSError:
        return False


def overview(run: Path) -> Overview:
    """One run."""
    records = _Records()
    path = run / "metrics.jsonl"
    has_records = path.is_file()  # a pipe would make the reader wait
    if has_records:
        records.read(path)
    try:
        kept = Store(run).steps()
    except OSError:  # its checkpoints are another user's
        kept = []
    state = records.end if has_records else "imported" if kept else DIED
    if is_held(run):
        state = "preparing text" if records.prepares else "running"
    step, loss, total = records.last
    return Overview(
        name=run.name, path=str(run), state=state, step=max(kept, default=None) if step is None else step,
        steps=records.steps, loss=loss, val_loss=records.evaluations[-1][1] if records.evaluations else None,
        best_val_loss=min((loss for _, loss in records.evaluations), default=None), tokens_per_s=records.speed,
        total_tokens=total, size_bytes=size_of(run), changed=records.time or run.stat().st_mtime,
    )  # fmt: skip


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder; links are not followed."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue  # it has just been removed
    return total


@dataclass
class _Records:
    """What the table needs of metrics.jsonl. Of the steps, which are nearly all of it, only the last are parsed."""

    steps: int | None = None
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    time: float | None = None
    end: str = DIED
    prepares: bool = False  # its text, as far as is known
    last: tuple[int | None, float | None, int | None] = (None, None, None)
    speed: float | None = None
    _begins: bool = False  # the next step is the first after a start or a resume

    def read(self, path: Path) -> None:
        lines: deque[bytes] = deque(maxlen=STEPS_OF_SPEED)
        try:
            with path.open("rb") as file:
                for line in file:
                    if line.startswith(STEP_LINE):
                        if self._begins:
                            lines.clear()  # what lies between is no part of the speed
                            self._begins = False
                        lines.append(line)
                    elif not line.startswith(SPHERES_LINE):
                        self._add(_parsed(line))
        except OSError:
            self.end = UNREADABLE
        self._add_steps([record for line in lines if (record := _parsed(line))])

    def _add(self, record: Record) -> None:
        self.time = number(record, "time") or self.time
        if record.get("kind") == "eval":
            step, loss = step_of(record), number(record, "val_loss")
            if step is not None and loss is not None:
                self._forget_after(step - 1)
                self.evaluations.append((step, loss))
        elif record.get("kind") == "event":
            name = record.get("event")
            self.prepares = name == PREPARING
            if name in ("start", "resume"):
                self.end, self._begins = DIED, True
                self._forget_after(step_of(record) or 0)
            if name in ("start", "resume", "replan"):
                self.steps = step_of(record, "steps") or self.steps
            if name == "failed":
                self.end = ENDS["failed"]
            elif name == "end":
                self.end = ENDS.get(str(record.get("reason")), "stopped")

    def _forget_after(self, step: int) -> None:
        """A resume goes on from an older checkpoint."""
        while self.evaluations and self.evaluations[-1][0] > step:
            self.evaluations.pop()

    def _add_steps(self, records: list[Record]) -> None:
        if not records:
            return
        last = records[-1]
        self.time = max(self.time or 0.0, number(last, "time") or 0.0)
        self.last = step_of(last), cross_entropy_of(last), step_of(last, "total_tokens")
        seconds = sum(number(record, "seconds") or 0.0 for record in records)
        tokens = sum(number(record, "tokens") or 0.0 for record in records)
        self.speed = tokens / seconds if seconds > 0 else None


def _parsed(line: bytes) -> Record:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError):
        return {}  # torn, or broken
    return record if isinstance(record, dict) else {}
