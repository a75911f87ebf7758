"""What a row's softmax is held against besides its target: a share alpha of it goes to other tokens.

A row with logits z and target t has the loss  cross-entropy + alpha (z[t] - sum_j q[j] z[j]):  (1 - alpha) times its
cross-entropy and alpha times the cross-entropy against q, since q sums to 1. The second term is the row's excess.
q stands in a table, K tokens and their weights for each target, or is uniform over the vocabulary (label smoothing).

A card says which: its address is `soft` in the kernels, 0 where there is nothing but the target.
R rows of a chunk, V vocabulary, K neighbours of a token.
"""

from __future__ import annotations

import numpy as np

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels.arrays import doubles, floats, integers, tokens

# Of a card, int64: alpha as the bits of a float64; K, 0 for uniform; addresses of int32 [V, K] and float32 [V, K].
ALPHA, NEIGHBOURS, IDS, WEIGHTS = range(4)
CARD_WORDS = 4


def card(alpha: float, neighbours: int, ids: int, weights: int) -> np.ndarray:
    """A card for the kernels, which is to be kept as long as they use it; ids and weights are addresses."""
    words = np.array([0, neighbours, ids, weights], np.int64)
    words.view(np.float64)[ALPHA] = alpha
    return words


@kernel
def share_of(soft):
    """alpha, 0 where there is no card."""
    return doubles(soft, CARD_WORDS)[ALPHA] if soft != 0 else 0.0


@kernel
def is_uniform(soft):
    """Whether q is the same for every token of the vocabulary."""
    return soft != 0 and integers(soft, CARD_WORDS)[NEIGHBOURS] == 0


@kernel
def row_of(soft, target):
    """The tokens of a target in the table, and their weights; empty where there is none."""
    ids, weights, k = soft, soft, 0
    if soft != 0:
        words = integers(soft, CARD_WORDS)
        k = words[NEIGHBOURS]
        ids, weights = words[IDS] + 4 * k * target, words[WEIGHTS] + 4 * k * target
    return tokens(ids, k), floats(weights, k)


@kernel
def expected_logit(soft, target, logits, first):
    """The sum of q[j] z[j] over the tokens of the table that are first + 0, 1, ... of `logits`, float64."""
    ids, weights = row_of(soft, target)
    total = 0.0
    for k in range(ids.size):
        j = ids[k] - first
        if 0 <= j < logits.size:
            total += np.float64(weights[k]) * np.float64(logits[j])
    return total
