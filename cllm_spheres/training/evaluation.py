"""Pinned windows of the validation part -> loss, perplexity, bits per byte, and what counting alone would reach."""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cllm_spheres.text.baselines import NgramLosses, ngram_losses
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.text.windows import evaluation_windows


@dataclass(frozen=True)
class Evaluation:
    """Losses in nats a token, over the same predicted tokens; bits_per_byte is None for word."""

    val_loss: float
    perplexity: float
    bits_per_byte: float | None
    unigram_loss: float
    bigram_loss: float
    tokens: int


class Windows:
    """The windows of a run's evaluations. Counting the training part goes on in a thread until it is needed."""

    def __init__(self, prepared: Prepared, block_size: int, eval_tokens: int) -> None:
        self.starts, self.lengths = evaluation_windows(len(prepared.val), block_size, eval_tokens)
        places = np.concatenate([np.arange(s, s + n) for s, n in zip(self.starts, self.lengths, strict=True)])
        contexts, targets = prepared.val[places], prepared.val[places + 1]
        self.num_tokens = len(places)
        token_bytes = prepared.token_bytes
        self._bytes = None if token_bytes is None else int(token_bytes[targets].sum(dtype=np.int64))
        pool = ThreadPoolExecutor(1, thread_name_prefix="baselines")
        self._baselines: Future[NgramLosses] = pool.submit(
            ngram_losses, prepared.train, contexts, targets, prepared.vocab_size
        )
        pool.shutdown(wait=False)

    @property
    def ready(self) -> bool:
        """Whether the counting is done."""
        return self._baselines.done()

    def evaluation(self, losses: np.ndarray) -> Evaluation:
        """losses: the summed loss of each window, float64, added in the order of the windows."""
        total = 0.0
        for loss in losses.tolist():
            total += loss
        mean = total / self.num_tokens
        baselines = self._baselines.result()
        return Evaluation(
            val_loss=mean,
            perplexity=math.exp(mean) if mean < 700 else math.inf,
            bits_per_byte=total / math.log(2) / self._bytes if self._bytes else None,
            unigram_loss=baselines.unigram,
            bigram_loss=baselines.bigram,
            tokens=self.num_tokens,
        )
