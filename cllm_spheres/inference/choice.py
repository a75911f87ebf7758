"""Logits of one position -> log-probabilities, in float64."""

from __future__ import annotations

import math

import numpy as np

from cllm_spheres.errors import NonFinite


def log_softmax(logits_V: np.ndarray) -> np.ndarray:
    """float64 [V]: the log-probability of each token, in nats. NonFinite where a logit is NaN or +inf."""
    logits = logits_V.astype(np.float64)
    largest = logits.max()  # NaN if any is
    if not math.isfinite(largest):
        raise not_finite()
    logits -= largest
    return logits - math.log(np.exp(logits).sum())


def not_finite() -> NonFinite:
    """What to raise where logits cannot be used."""
    return NonFinite("The model's logits are not finite: its weights are damaged or its training diverged.")
