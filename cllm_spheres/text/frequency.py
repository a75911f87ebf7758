"""A prepared folder -> its tokens in order of frequency, whose places are the ranks that the crystal computes with."""

# V vocabulary

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cllm_spheres.errors import InputError
from cllm_spheres.text.prepared import Prepared

_TOGETHER = 1 << 22  # tokens counted at once


def frequency_order(prepared: Prepared) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """ids int64 [V], the most frequent first, and counts int64 [V] by id, over the training part.

    Of equally frequent ones the lower id is first, and those that never occur are last. InputError where a token
    is not in the vocabulary.
    """
    size = prepared.vocab_size
    counts_V = np.zeros(size, np.int64)
    for start in range(0, len(prepared.train), _TOGETHER):
        found = np.bincount(prepared.train[start : start + _TOGETHER], minlength=size)
        if len(found) > size:
            raise InputError(
                f"The prepared folder {prepared.folder} is damaged: train.bin holds token {len(found) - 1}, the "
                f"vocabulary is {size}. Prepare the text anew."
            )
        counts_V += found
    return np.argsort(-counts_V, kind="stable"), counts_V
