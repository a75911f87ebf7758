"""A text's number of tokens -> the windows of an evaluation, pinned or sliding: arithmetic without kernels."""

from __future__ import annotations

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


def num_sliding_windows(predictable: int, block_size: int, stride: int) -> int:
    """How many windows score each of so many predictable tokens (one less than the text has) once."""
    return 1 + max(0, -(-(predictable - block_size) // stride))


def sliding_windows(
    predictable: int, block_size: int, stride: int, first: int, last: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows first..last: (starts, lengths, first scored rows; int64). 1 <= stride <= block_size.

    Each begins `stride` tokens after the one before, and scores what that has not reached: at least
    block_size - stride tokens of context stand before a scored row, except in the first window.
    """
    numbers = np.arange(first, last, dtype=np.int64)
    starts = numbers * stride
    lengths = np.minimum(block_size, predictable - starts)
    return starts, lengths, np.where(numbers > 0, block_size - stride, 0)
