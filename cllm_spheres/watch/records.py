"""One record of metrics.jsonl -> its values, checked: what is missing or of the wrong kind is None."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cllm_spheres.config import MAX_SPHERES
from cllm_spheres.events import Record


def number(record: Record, key: str) -> float | None:
    """record[key] as a finite float, else None."""
    return finite(record.get(key))


def finite(value: Any) -> float | None:
    if type(value) is float:  # nearly always: thousands of steps a second pass here
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def cross_entropy_of(record: Record) -> float | None:
    """A step's plain cross-entropy, which compares with validation; older runs wrote only the loss, which it was."""
    value = number(record, "cross_entropy")
    return number(record, "loss") if value is None else value


def step_of(record: Record, key: str = "step") -> int | None:
    """record[key] as a step number, else None."""
    value = number(record, key)
    return int(value) if value is not None and 0 <= value < 2**53 else None


@dataclass
class Spheres:
    """A "spheres" record; lists by sphere."""

    time: float
    worker: list[float | None]
    throughput: list[float | None]  # tokens/s
    waiting: list[float | None]  # share of time, 0 to 1
    state: list[str]  # "" where unknown
    cpu_percent: float | None
    memory_bytes: float | None

    def __len__(self) -> int:
        return len(self.state)

    @classmethod
    def of(cls, record: Record) -> Spheres:
        keys = ("worker", "throughput", "waiting", "state")
        given = [record.get(key) for key in keys]
        lists = [value[:MAX_SPHERES] if isinstance(value, list) else [] for value in given]
        num = max(map(len, lists))
        worker, throughput, waiting, state = ([*values, *[None] * (num - len(values))] for values in lists)
        return cls(
            time=number(record, "time") or 0.0,
            worker=[finite(v) for v in worker],
            throughput=[None if (x := finite(v)) is None else max(0.0, x) for v in throughput],
            waiting=[None if (x := finite(v)) is None else min(1.0, max(0.0, x)) for v in waiting],
            state=[v if isinstance(v, str) else "" for v in state],
            cpu_percent=number(record, "cpu_percent"),
            memory_bytes=number(record, "memory_bytes"),
        )
