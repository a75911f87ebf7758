"""Traces of a step -> where its time went: a table for people, and a file for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from cllm_spheres.kernels.trace import HEADER_WORDS, KINDS, PACK, SPHERE, UPDATE
from cllm_spheres.spheres.job import Job
from cllm_spheres.spheres.memory import SharedMemory
from cllm_spheres.spheres.topology import hosted

WARM_UP_STEPS = 10  # pages have been taken by then
MARKS_A_CALL = 8  # at most
MARKS_A_STEP = 16
PHASES = range(PACK, UPDATE + 1)  # the kinds that are not part of a shard


@dataclass(frozen=True)
class Interval:
    """One kernel call or phase. sphere: None outside the shards. Times in ns of the monotonic clock."""

    worker: int
    sphere: int | None
    kind: int
    start: int
    end: int


def marks_needed(job: Job) -> int:
    """Room for the marks that the busiest worker leaves in a step."""
    train = job.programs["train"]
    groups = -(-job.largest_shard // train.sequences)
    spheres = len(hosted(0, job.workers, job.spheres))
    return MARKS_A_STEP + spheres * (2 + groups * MARKS_A_CALL * len(train.calls))


def intervals(memory: SharedMemory) -> Iterator[Interval]:
    """All intervals of the traced step, worker by worker."""
    for worker in range(memory.sizes.num_spheres):
        words = memory.trace_words(worker)
        marks = words[HEADER_WORDS : HEADER_WORDS + 2 * int(words[0])].reshape(-1, 2).tolist()
        sphere = None
        for (_, start), (kind, end) in pairwise(marks):
            if kind >= SPHERE:
                sphere = kind - SPHERE
            elif end > start:
                yield Interval(worker, None if kind in PHASES else sphere, kind, start, end)


def write(found: list[Interval], step: int, folder: Path) -> Path:
    """profile.md and profile.json in the run's folder; the path of the first. OSError where it cannot."""
    text = "\n".join(lines(found, step)) + "\n"
    (folder / "profile.json").write_text(json.dumps(chrome_trace(found, step)) + "\n")
    (folder / "profile.md").write_text(text)
    return folder / "profile.md"


def lines(found: list[Interval], step: int) -> list[str]:
    """A Markdown table of kinds and one of spheres."""
    total = sum(i.end - i.start for i in found)
    spheres = sorted({i.sphere for i in found if i.sphere is not None})
    workers = {i.sphere: i.worker for i in found}
    result = [
        f"# Step {step}: where the time of {len({i.worker for i in found})} workers went", "",
        "| kernel or phase | calls | ms of all workers | share | ms of a sphere, mean | slowest sphere |",
        "|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    by_kind: dict[int, list[Interval]] = {}
    for interval in found:
        by_kind.setdefault(interval.kind, []).append(interval)
    for kind, ones in sorted(by_kind.items(), key=lambda item: -sum(i.end - i.start for i in item[1])):
        spent = sum(i.end - i.start for i in ones)
        row = f"| {KINDS[kind]} | {len(ones)} | {spent / 1e6:.3f} | {100 * spent / total:.1f} % |"
        if kind in PHASES:
            result.append(f"{row} | |")
            continue
        each = {s: sum(i.end - i.start for i in ones if i.sphere == s) for s in spheres}
        slowest = max(each, key=lambda s: each[s])
        result.append(f"{row} {spent / 1e6 / len(spheres):.3f} | {each[slowest] / 1e6:.3f} (sphere {slowest}) |")
    result += ["", "| sphere | worker | ms |", "|---:|---:|---:|"]
    for sphere in spheres:
        spent = sum(i.end - i.start for i in found if i.sphere == sphere)
        result.append(f"| {sphere} | {workers[sphere]} | {spent / 1e6:.3f} |")
    return result


def chrome_trace(found: list[Interval], step: int) -> dict[str, Any]:
    """The trace event format: complete events in microseconds from the step's start, a thread for each worker."""
    begin = min(i.start for i in found)
    names = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": worker, "args": {"name": f"worker {worker}"}}
        for worker in sorted({i.worker for i in found})
    ]
    events = [
        {
            "name": KINDS[i.kind], "cat": "phase" if i.kind in PHASES else "kernel", "ph": "X", "pid": 0,
            "tid": i.worker, "ts": (i.start - begin) / 1e3, "dur": (i.end - i.start) / 1e3,
            "args": {} if i.sphere is None else {"sphere": i.sphere},
        }
        for i in found
    ]  # fmt: skip
    return {"traceEvents": names + events, "displayTimeUnit": "ms", "otherData": {"step": step}}
