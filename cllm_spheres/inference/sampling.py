"""The logits of one position and one uniform number -> the id of the next token. A pure function, in float64.

Temperature first, then top-k, then top-p, each renormalised, as in Hugging Face's sampler; then the inverse
of the cumulative distribution, over the ids in ascending order.
"""

# V vocabulary, K candidates

from __future__ import annotations

import math

import numpy as np

from cllm_spheres.errors import InputError, NonFinite


def choose(
    logits_V: np.ndarray,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    uniform: float,
) -> int:
    """The id of the next token.

    `logits_V` is float32 and is not changed; an id whose logit is -inf is never chosen. Temperature 0 takes
    the largest logit, the lowest id of equal ones. `top_k` keeps the k largest (of equal ones the lowest
    ids), `top_p` the smallest set of the most probable whose probability reaches it (Holtzman et al. 2020,
    The Curious Case of Neural Text Degeneration); None is off. `uniform` is in [0, 1). Raises NonFinite where
    a logit is NaN or +inf, or all are -inf. The options are expected to have passed `validate`.
    """
    largest = float(logits_V.max())  # NaN if any is
    if not math.isfinite(largest):
        raise NonFinite(f"The model's logits hold {largest}: its weights are damaged or its training diverged.")
    if temperature == 0:
        return int(np.argmax(logits_V))

    weights_V = logits_V.astype(np.float64) - largest
    with np.errstate(over="ignore"):  # far below the largest at a low temperature: exp(-inf) = 0 is meant
        weights_V /= temperature
    np.exp(weights_V, out=weights_V)

    if (top_k is None or top_k >= len(weights_V)) and (top_p is None or top_p >= 1):
        return _inverse_cdf(weights_V, uniform)
    ids_K = _largest(logits_V, top_k)
    if top_p is not None and top_p < 1:
        ids_K = ids_K[: _reaching(weights_V[ids_K], top_p)]
    ids_K = np.sort(ids_K)
    return int(ids_K[_inverse_cdf(weights_V[ids_K], uniform)])


def _largest(logits_V: np.ndarray, top_k: int | None) -> np.ndarray:
    """The ids of the `top_k` largest logits (None: all), descending; of equal ones the lower id first."""
    ids = np.arange(len(logits_V))
    if top_k is not None and top_k < len(ids):
        least = np.partition(logits_V, -top_k)[-top_k]
        above, equal = ids[logits_V > least], ids[logits_V == least]
        ids = np.sort(np.concatenate([above, equal[: top_k - len(above)]]))
    return ids[np.argsort(-logits_V[ids], kind="stable")]


def _reaching(weights_K: np.ndarray, top_p: float) -> int:
    """How many of the descending weights it takes to reach the share `top_p` of their sum: at least one."""
    cumulative_K = np.cumsum(weights_K)
    return int(np.searchsorted(cumulative_K, top_p * cumulative_K[-1], side="left")) + 1


def _inverse_cdf(weights_K: np.ndarray, uniform: float) -> int:
    """The first index where the running sum exceeds the share `uniform`; its weight is above 0."""
    cumulative_K = np.cumsum(weights_K)
    index = int(np.searchsorted(cumulative_K, uniform * cumulative_K[-1], side="right"))
    if index == len(cumulative_K):  # the product was rounded up to the whole
        index = int(np.searchsorted(cumulative_K, cumulative_K[-1], side="left"))
    return index


def validate(temperature: float, top_k: int | None, top_p: float | None, tokens: int) -> None:
    """Raises InputError, one line for each option that cannot work."""
    wrong = []
    if not (math.isfinite(temperature) and temperature >= 0):
        wrong.append(f"--temperature {temperature} must be 0 (always the likeliest token) or above, and finite.")
    if top_k is not None and top_k < 1:
        wrong.append(f"--top-k {top_k} must be 1 or above; leave it out to keep all tokens.")
    if top_p is not None and not 0 < top_p <= 1:
        wrong.append(f"--top-p {top_p} must be above 0 and at most 1; leave it out to keep all tokens.")
    if tokens < 1:
        wrong.append(f"--tokens {tokens} must be 1 or above.")
    if wrong:
        raise InputError("\n".join(wrong))
