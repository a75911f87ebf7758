"""Training ids and validation pairs -> the losses that counting alone reaches: unigram and bigram."""

# V vocabulary, N validation tokens, M training tokens, K distinct pairs

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_TOKENS = 50_000_000  # of the training part that are counted
_HELD_OUT = 0.1  # share of them on which the weight is chosen
_MAX_HELD_OUT = 1_000_000
_CHUNK = 4 << 20  # pairs sorted at a time: bounds memory
_WEIGHTS = np.arange(64) / 64  # of the bigram; below 1, so that an unseen pair has a probability

Ids = npt.NDArray[np.integer]


@dataclass(frozen=True)
class NgramLosses:
    """Mean losses in nats per token; `weight` is the share of the bigram in the interpolation."""

    unigram: float
    bigram: float
    weight: float


def ngram_losses(train_ids: Ids, contexts: Ids, targets: Ids, vocab_size: int) -> NgramLosses:
    """Loss of `targets` [N] after `contexts` [N] (any equal shapes) under counts of the training ids [M].

    Unigram: (count + 1) / (M + V). Bigram: weight * count(a, b) / count(a) + (1 - weight) * unigram, with
    the unigram alone where `a` was never seen; the weight is the best of 64 on the last tenth of the
    training ids, counted on the rest. At most the first 50 M training ids are counted.
    """
    train_ids = train_ids[:MAX_TOKENS]
    contexts_N, targets_N = np.ravel(contexts), np.ravel(targets)
    border = len(train_ids) - min(int(len(train_ids) * _HELD_OUT), _MAX_HELD_OUT)
    held_out = train_ids[max(border - 1, 0) :]
    weight = 0.0
    if len(held_out) > 1 and border > 1:
        counts = _Counts(train_ids[:border], vocab_size)
        unigram_N, conditional_N, seen_N = counts.probabilities(held_out[:-1], held_out[1:])
        losses = [_loss(unigram_N, conditional_N, seen_N, w) for w in _WEIGHTS]
        weight = float(_WEIGHTS[int(np.argmin(losses))])
    unigram_N, conditional_N, seen_N = _Counts(train_ids, vocab_size).probabilities(contexts_N, targets_N)
    return NgramLosses(
        unigram=_loss(unigram_N, conditional_N, seen_N, 0.0),
        bigram=_loss(unigram_N, conditional_N, seen_N, weight),
        weight=weight,
    )


def _loss(
    unigram_N: npt.NDArray[np.float64],
    conditional_N: npt.NDArray[np.float64],
    seen_N: npt.NDArray[np.bool_],
    w: float,
) -> float:
    if not len(unigram_N):
        return float("nan")
    mixed_N = w * conditional_N + (1 - w) * unigram_N
    return float(-np.log(np.where(seen_N, mixed_N, unigram_N)).mean())


class _Counts:
    """Counts of tokens and of neighbouring pairs; pairs as sorted keys a * V + b with their counts."""

    def __init__(self, ids: Ids, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.num_tokens = len(ids)
        self.tokens_V = np.zeros(vocab_size, np.int64)
        self.contexts_V = np.zeros(vocab_size, np.int64)  # as the first of a pair
        self.keys_K = np.zeros(0, np.int64)
        self.pairs_K = np.zeros(0, np.int64)
        for start in range(0, len(ids), _CHUNK):
            chunk = np.asarray(ids[start : start + _CHUNK + 1], np.int64)  # one more: pairs across the border
            own = chunk[:_CHUNK]
            self.tokens_V += np.bincount(own, minlength=vocab_size)
            self.contexts_V += np.bincount(chunk[:-1], minlength=vocab_size)
            self._add(*np.unique(chunk[:-1] * vocab_size + chunk[1:], return_counts=True))

    def _add(self, keys: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> None:
        if not len(self.keys_K):
            self.keys_K, self.pairs_K = keys, counts
            return
        all_keys, all_counts = np.concatenate([self.keys_K, keys]), np.concatenate([self.pairs_K, counts])
        order = np.argsort(all_keys, kind="stable")
        all_keys, all_counts = all_keys[order], all_counts[order]
        firsts = np.flatnonzero(np.concatenate([[True], all_keys[1:] != all_keys[:-1]]))
        self.keys_K, self.pairs_K = all_keys[firsts], np.add.reduceat(all_counts, firsts)

    def probabilities(
        self, contexts: Ids, targets: Ids
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """Unigram and conditional probability of each target, and whether its context was ever seen."""
        contexts_N, targets_N = np.asarray(contexts, np.int64), np.asarray(targets, np.int64)
        unigram_N = (self.tokens_V[targets_N] + 1) / (self.num_tokens + self.vocab_size)
        wanted_N = contexts_N * self.vocab_size + targets_N
        pairs_N = np.zeros(len(wanted_N))
        if len(self.keys_K):
            place_N = np.minimum(np.searchsorted(self.keys_K, wanted_N), len(self.keys_K) - 1)
            pairs_N = np.where(self.keys_K[place_N] == wanted_N, self.pairs_K[place_N], 0)
        contexts_seen_N = self.contexts_V[contexts_N]
        return unigram_N, pairs_N / np.maximum(contexts_seen_N, 1), contexts_seen_N > 0
