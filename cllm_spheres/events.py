"""The records of a run -> lines of metrics.jsonl, and back.

metrics.jsonl is the only thing that the dashboard, `watch` and scripts read. One JSON object a line:

    kind "step"     step, loss, lr, grad_norm, clipped_norm, tokens, total_tokens, time, seconds, tokens_per_s,
                    compute_s, waiting_s, gather_s, update_s, other_s; pack_s where weights are packed
    kind "eval"     step, val_loss, perplexity, bits_per_byte (null for `word`), unigram_loss, bigram_loss,
                    tokens, time, seconds
    kind "spheres"  step, time, worker, throughput, waiting, state, memory: lists indexed by sphere;
                    cpu_percent (of the whole run, 100 is one core), memory_bytes (of the whole run)
    kind "event"    event, step, time, message; and fields of its own

`time` is Unix time in seconds, `seconds` and `..._s` are durations. `step` counts updates: step 1 is the
first. A value that is not finite is written as null, so that every JSON reader can read the file. Floats are
written so that they read back as the same bits. A torn last line is ignored; the last object of a step wins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]

LONGEST_LINE = 1 << 20  # bytes; one of 156 spheres has about 20,000
KINDS = ("step", "eval", "spheres", "event")

# The names of events, in the order in which a run usually meets them.
PREPARING = "preparing"
EVENTS = (
    PREPARING,  # share: how far the preparing of its text is, before the run starts
    "start",  # workers, spheres, batch_size, block_size, steps, num_parameters, run, cores, dtype, pinned, config
    "note",  # of what makes the run slow here
    "ready",  # seconds: what starting took
    "eta",  # seconds: what the run will take, from a rehearsal of one shard
    "resume",  # from_step
    "refused",  # a damaged checkpoint that was passed over
    "replan",  # steps
    "fingerprint",  # differences: what differs from the run's first numerics
    "profile",  # path, unless it could not be written
    "skip",  # a step whose gradient was not finite, under --on-nonfinite skip; skipped: how many so far
    "saved",  # path, seconds: to write it; copy_s: for which the training waited
    "unsaved",  # seconds: until the next try, or what was waited in vain
    "best",  # as saved, with val_loss: the lowest so far
    "turned_up",  # validation loss has risen: best_step, best_loss
    "hung",  # worker: it did nothing for too long and is ended
    "lost",  # worker, pid; of the process that starts the workers neither
    "fewer",  # workers: how many are left, where one place lost too many
    "recovered",  # workers, seconds
    "scaled",  # workers, pinned: on another command's wish
    "unfired",  # faults on purpose that did not happen
    "stopping",  # signal
    "failed",  # error
    "end",  # reason: "done", "early_stop", "stop_at", "asked", "signal"; path of the last checkpoint
)


def dumps(record: Record) -> str:
    """One line of metrics.jsonl, without the newline."""
    try:
        return json.dumps(record, allow_nan=False, separators=(",", ":"))
    except ValueError:
        return json.dumps(_finite(record), allow_nan=False, separators=(",", ":"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def event(name: str, message: str, *, step: int, time: float, **fields: Any) -> Record:
    """An event record; `message` is a sentence for people."""
    assert name in EVENTS, name
    return {"kind": "event", "event": name, "step": step, "time": time, "message": message, **fields}


class Tail:
    """Reads a growing metrics.jsonl: each call of `read` returns the records that were completed since."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def skip(self) -> None:
        """Leave out what is there already; a torn last line will be cut off and written over."""
        if self.path.is_file():
            with self.path.open("rb") as file:
                start = file.seek(max(0, file.seek(0, 2) - LONGEST_LINE))
                self._offset = start + file.read().rfind(b"\n") + 1

    def read(self) -> list[Record]:
        if not self.path.is_file():  # not there yet; or a pipe, which would not be read to its end
            return []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        return list(_parse(data[:end]))


def read(path: Path, last: bool = False) -> list[Record]:
    """All whole records of a metrics.jsonl, or some of the last; a torn or broken line is left out."""
    tail = Tail(path)
    if last and path.is_file():
        tail._offset = max(0, path.stat().st_size - LONGEST_LINE)
    return tail.read()


def _parse(data: bytes) -> Iterator[Record]:
    for line in data.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and "kind" in record:
            yield record
