"""A text's number of tokens -> the windows of an evaluation, pinned or sliding: arithmetic without kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


def evaluation_windows(num_tokens: int, block_size: int, eval_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Pinned windows (starts, lengths; int64) of at most about eval_tokens predicted tokens.

    Where the whole validation part fits, it is all of it, the last window shorter; else whole windows evenly
    spread over it. A window of length T predicts T tokens and needs T + 1.
    """
    predictable = num_tokens - 1
    if eval_tokens >= predictable or predictable < block_size:
        starts = np.arange(0, predictable, block_size, dtype=np.int64)
        return starts, np.minimum(block_size, predictable - starts)
    count = max(1, eval_tokens // block_size)
    whole = predictable // block_size
    starts = (np.arange(count, dtype=np.int64) * whole // count) * block_size
    return starts, np.full(count, block_size, np.int64)


@dataclass(frozen=True)
class Sliding:
    """Windows that slide over a text, each scoring `stride` tokens, and the first all of its own.

    Window n begins `stride` tokens after window n - 1 and scores what that has not reached: at least
    block_size - stride tokens of context stand before a scored row, except in the first. `chosen` of the whole windows,
    evenly spread, or (None) all, which score each of the `predictable` tokens (one less than the text has) once.
    1 <= stride <= block_size. With a stride of one block these are the windows of a training's evaluation.
    """

    predictable: int
    block_size: int
    stride: int
    chosen: int | None = None

    @classmethod
    def about(cls, tokens: int, predictable: int, block_size: int, stride: int) -> Sliding:
        """Windows that score at most about so many tokens; all of them where the text has no more."""
        if tokens >= predictable or predictable < block_size:
            return cls(predictable, block_size, stride)
        return cls(
            predictable, block_size, stride, min(max(1, tokens // stride), _whole(predictable, block_size, stride))
        )

    @property
    def count(self) -> int:
        """How many windows there are."""
        return self.chosen or 1 + max(0, -(-(self.predictable - self.block_size) // self.stride))

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        if self.chosen is None:
            return self.predictable
        return self.block_size + (self.chosen - 1) * self.stride  # the first window is always among them

    def windows(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of first..last: (starts, lengths, first scored rows; int64)."""
        numbers = np.arange(first, last, dtype=np.int64)
        if self.chosen is not None:
            numbers = numbers * _whole(self.predictable, self.block_size, self.stride) // self.chosen
        starts = numbers * self.stride
        lengths = np.minimum(self.block_size, self.predictable - starts)
        return starts, lengths, np.where(numbers > 0, self.block_size - self.stride, 0)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Where the scored tokens' contexts are: [first, last), all of the text or a range a window."""
        if self.chosen is None:
            yield 0, self.predictable
            return
        for start, length, first in zip(*self.windows(0, self.chosen), strict=True):
            yield int(start + first), int(start + length)


def _whole(predictable: int, block_size: int, stride: int) -> int:
    """How many windows have a whole block."""
    return 1 + (predictable - block_size) // stride
