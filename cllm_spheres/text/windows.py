"""The validation part -> the pinned windows of an evaluation: arithmetic without kernels."""

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
