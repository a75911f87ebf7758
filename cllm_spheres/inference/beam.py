"""A prompt -> the likeliest texts that a search with a beam finds.

At each step every one of `width` unfinished texts is tried with every token, and the `width` likeliest of all go on.
A text that ends counts its log-probability divided by length ** length_penalty, the length in new tokens with the
end of text. The search ends when `width` texts have, or none that goes on could still count more.
Source: Wu et al. 2016, Google's Neural Machine Translation System (the penalty there has another form).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cllm_spheres.errors import InputError, shown
from cllm_spheres.inference.choice import log_softmax
from cllm_spheres.inference.decoder import Decoder, Rows
from cllm_spheres.inference.options import is_number, is_whole
from cllm_spheres.inference.weights import Weights

WIDEST = 64
STRONGEST_PENALTY = 10.0  # either way; beyond, lengths to that power leave the range of floats
TOKENS = 200  # at most, where none are given


@dataclass(frozen=True)
class Beam:
    """One text that was found: its new tokens, without the end of text."""

    text: str
    tokens: tuple[int, ...]
    logprob: float  # nats, of all new tokens
    score: float  # by which it counts
    ended: bool  # by an end of text


@dataclass(frozen=True)
class _Open:
    """A text that goes on, in a slot that holds the keys and values of all its tokens but the last."""

    slot: int
    ids: tuple[int, ...]
    logprob: float


def beam_search(
    model: Weights, prompt: Sequence[int], *, tokens: int | None, width: int, length_penalty: float, best: int,
    dtype: str = "fp32", threads: int | None = None,
) -> list[Beam]:  # fmt: skip
    """The `best` texts that count most, in that order; of equal ones those with the lower ids.

    tokens: at most so many; None is 200, or what the block leaves.

    InputError for options out of range, and where prompt and tokens do not fit the block.
    """
    _check(model, prompt, tokens, width, length_penalty, best)
    tokens = tokens or min(TOKENS, model.shape.block_size - len(prompt) + 1)
    eot, vocab_size = model.tokenizer.eot, model.shape.vocab_size
    decoder = Decoder(model.layout, model.params_P, slots=width, dtype=dtype, threads=threads)
    try:
        done: list[Beam] = []

        def finish(ids: tuple[int, ...], logprob: float, ended: bool) -> None:
            score = logprob / (len(ids) + ended) ** length_penalty
            done.append(Beam(model.tokenizer.decode(ids), ids, logprob, score, ended))

        logprobs_V = _read_prompt(decoder, prompt)
        texts, logprobs_WV = [_Open(0, (), 0.0)], logprobs_V[None]
        for length in range(1, tokens + 1):
            totals = (np.array([text.logprob for text in texts])[:, None] + logprobs_WV).reshape(-1)
            likeliest = _largest(totals, 2 * width)  # twice: each of the texts may end, and as many go on
            following: list[tuple[_Open, int, float]] = []
            for rank, at in enumerate(likeliest):
                text, token = texts[at // vocab_size], int(at % vocab_size)
                if not math.isfinite(totals[at]):
                    break
                if token != eot:
                    following.append((text, token, float(totals[at])))
                elif rank < width:
                    finish(text.ids, float(totals[at]), True)
                if len(following) == width:
                    break
            texts = _moved(decoder, following, width)
            if not texts or len(done) >= width or _is_decided(done, texts, length, tokens, length_penalty, best):
                break
            if length < tokens:
                position = len(prompt) + length - 1
                rows, most = [Rows(text.slot, position, text.ids[-1:]) for text in texts], decoder.most_wanted
                passes = (rows[first : first + most] for first in range(0, len(rows), most))
                logprobs_WV = np.stack([log_softmax(row) for some in passes for row in decoder.run(some)])
        else:
            for text in texts:
                finish(text.ids, text.logprob, False)
        return sorted(done, key=lambda beam: (-beam.score, beam.tokens))[:best]
    finally:
        decoder.close()


def _check(
    model: Weights, prompt: Sequence[int], tokens: int | None, width: int, length_penalty: float, best: int
) -> None:
    wrong = []
    if not (is_whole(width) and 1 <= width <= WIDEST):
        wrong.append(f"--beams {shown(width)} must be 1 to {WIDEST}.")
    elif not (is_whole(best) and 1 <= best <= width):
        wrong.append(f"--best {shown(best)} must be 1 to --beams, which is {width}.")
    if not (is_number(length_penalty) and abs(length_penalty) <= STRONGEST_PENALTY):
        wrong.append(
            f"--length-penalty {shown(length_penalty)} must be {-STRONGEST_PENALTY:g} to {STRONGEST_PENALTY:g};"
            " 0 is none, above 0 favours longer texts."
        )
    most = model.shape.block_size - len(prompt) + 1
    if most < 1:
        wrong.append(
            f"The prompt has {len(prompt):,} tokens, and the model's block {model.shape.block_size:,}: shorten it."
        )
    elif tokens is not None and not (is_whole(tokens) and 1 <= tokens <= most):
        wrong.append(
            f"--tokens {shown(tokens)} must be 1 to {most:,}: a search does not go beyond the model's block of"
            f" {model.shape.block_size:,}, and the prompt has {len(prompt):,}."
        )
    if wrong:
        raise InputError("\n".join(wrong))


def _read_prompt(decoder: Decoder, prompt: Sequence[int]) -> np.ndarray:
    """The prompt into slot 0; the log-probabilities of what follows it."""
    logits = np.empty((0, 0), np.float32)
    for first in range(0, len(prompt), decoder.most_rows):
        part = prompt[first : first + decoder.most_rows]
        logits = decoder.run([Rows(0, first, part, int(first + len(part) == len(prompt)))])
    return log_softmax(logits[0])


def _moved(decoder: Decoder, following: list[tuple[_Open, int, float]], width: int) -> list[_Open]:
    """Those that go on: the first that follows a text takes its slot, the others a copy."""
    free = [slot for slot in range(width) if slot not in {text.slot for text, _, _ in following}]
    taken: set[int] = set()
    texts = []
    for text, token, logprob in following:
        slot = text.slot
        if slot in taken:
            slot = free.pop()
            decoder.copy(text.slot, slot)
        taken.add(slot)
        texts.append(_Open(slot, (*text.ids, token), logprob))
    return texts


def _is_decided(
    done: list[Beam], texts: list[_Open], length: int, tokens: int, length_penalty: float, best: int
) -> bool:
    """Whether no text that goes on can come to count more than the `best` that have ended."""
    if len(done) < best:
        return False
    counted = sorted((beam.score for beam in done), reverse=True)[best - 1]
    longest = tokens if length_penalty > 0 else length + 1
    return max(text.logprob for text in texts) / longest**length_penalty < counted


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Where the largest values stand, descending; of equal ones the first."""
    count = min(count, values.size)
    least = np.partition(values, values.size - count)[values.size - count]
    at = np.flatnonzero(values >= least)
    return at[np.argsort(-values[at], kind="stable")][:count]
