"""(step, value) one after another -> at most `capacity` points that still show the whole curve.

A point is the mean of `stride` neighbouring steps. Where the points grow too many, the stride doubles.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

Point = tuple[float, float]


class Series:
    """A curve in bounded memory. A step given again supersedes itself and every later one."""

    def __init__(self, capacity: int = 512, *, sampled: bool = False) -> None:
        """`sampled`: of `stride` neighbouring steps keep the first, not the mean; it costs less."""
        assert capacity >= 2, capacity
        self.sampled = sampled
        self.capacity = capacity
        self.stride = 1
        self.last_step = -1
        self._keys: list[int] = []  # step // stride, ascending
        self._steps: list[int] = []  # the last step of each point
        self._sums: list[float] = []
        self._counts: list[int] = []

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, step: int, value: float) -> None:
        if step <= self.last_step:
            self.drop_after(step - 1)
        key = step // self.stride
        if self._keys and self._keys[-1] == key:
            if self.sampled:
                return
            self._steps[-1] = step
            self._sums[-1] += value
            self._counts[-1] += 1
        else:
            self._append(key, step, value, 1)
        self.last_step = step
        while len(self._keys) > self.capacity:
            self._halve()

    def drop_after(self, step: int) -> None:
        """Forget the steps beyond `step`; a point that reaches across goes too (a pixel of the curve)."""
        end = bisect_left(self._steps, step + 1)
        for column in (self._keys, self._steps, self._sums, self._counts):
            del column[end:]
        self.last_step = self._steps[-1] if self._steps else -1

    def points(self) -> list[Point]:
        """[(step, mean)], ascending."""
        return [(s, v / n) for s, v, n in zip(self._steps, self._sums, self._counts, strict=True)]

    def smoothed(self, share: float = 0.05) -> list[Point]:
        """Centred moving mean over `share` of the points (at least 3): it does not lag behind a fall."""
        half = max(1, round(share * len(self._keys) / 2))
        totals = [0.0, *accumulate(self._sums)]
        counts = [0, *accumulate(self._counts)]
        result: list[Point] = []
        for i, step in enumerate(self._steps):
            start, end = max(0, i - half), min(len(self._steps), i + half + 1)
            result.append((step, (totals[end] - totals[start]) / (counts[end] - counts[start])))
        return result

    def recent(self, share: float = 0.05) -> float | None:
        """The last value of `smoothed`."""
        half = max(1, round(share * len(self._keys) / 2))
        counts = sum(self._counts[-half - 1 :])
        return sum(self._sums[-half - 1 :]) / counts if counts else None

    def _append(self, key: int, step: int, total: float, count: int) -> None:
        self._keys.append(key)
        self._steps.append(step)
        self._sums.append(total)
        self._counts.append(count)

    def _halve(self) -> None:
        old = list(zip(self._keys, self._steps, self._sums, self._counts, strict=True))
        self.stride *= 2
        self._keys, self._steps, self._sums, self._counts = [], [], [], []
        for key, step, total, count in old:
            if self._keys and self._keys[-1] == key // 2:
                if not self.sampled:
                    self._steps[-1] = step
                    self._sums[-1] += total
                    self._counts[-1] += count
            else:
                self._append(key // 2, step, total, count)
