"""A growing metrics.jsonl -> its new records, some steps left out where they come too fast to be seen.

Reading costs about 30 microseconds a record; at thousands of steps a second that would slow the training. A
left-out step changes no rate: `RunView` takes tokens and seconds across the gap.
"""

from __future__ import annotations

import json
from pathlib import Path

from cllm_spheres.events import Record

CHUNK_BYTES = 4 << 20  # of one read, so that a long run's file never stands in memory whole
NUM_WHOLE = 200  # steps that are all read, at the start: a short run is seen step by step
MOST_STEPS = 12  # of one read, after those
MOST_STEPS_BACKLOG = 2000  # of one read that catches up with what was written before
BACKLOG_BYTES = 256 << 10


class Reader:
    """Each `read` returns records that were completed since; `[]` at the end of the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._num_steps = 0

    def read(self) -> list[Record]:
        if not self.path.is_file():  # a pipe would make the reader wait
            return []
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read(CHUNK_BYTES)
        except OSError:
            return []
        end = data.rfind(b"\n") + 1
        if not end and len(data) == CHUNK_BYTES:  # no line is this long: broken, skip it
            end = len(data)
        self._offset += end
        lines = data[:end].splitlines()
        most = MOST_STEPS_BACKLOG if end > BACKLOG_BYTES else MOST_STEPS
        records = []
        for line in self._thin(lines, most):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and "kind" in record:
                records.append(record)
        return records or ([{"kind": "broken"}] if end else [])  # only [] means the end of the file

    def _thin(self, lines: list[bytes], most: int) -> list[bytes]:
        """The lines, with about `most` of those of steps, evenly, always the last one."""
        steps = [i for i, line in enumerate(lines) if line.startswith(b'{"kind":"step"')]
        whole = max(0, NUM_WHOLE - self._num_steps)
        self._num_steps += len(steps)
        late = steps[whole:]
        if len(late) <= most:
            return lines
        left_out = set(late) - set(late[:: -(-len(late) // most)]) - {late[-1]}
        return [line for i, line in enumerate(lines) if i not in left_out]
