"""Prompts and options -> many texts at once, token by token, in one batch that texts join and leave at any time.

A text is a pure function of weights, prompt, options and the number of the sample: not of what is written beside it,
nor of the number of threads. A text that outgrows the block goes on from its last half, at positions from 0 again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from cllm_spheres.crystal.random import PURPOSE_SAMPLING, combine, key_of, uniform
from cllm_spheres.inference.choice import log_softmax, not_finite
from cllm_spheres.inference.decoder import Decoder, Rows
from cllm_spheres.inference.options import Options, check_prompt
from cllm_spheres.inference.stops import Stops
from cllm_spheres.inference.weights import Weights
from cllm_spheres.kernels.choose import SCRATCH_WORDS, choose_token
from cllm_spheres.text.tokenizer import StreamDecoder

COPIED_FROM = 16  # tokens: computing fewer is quicker than copying a whole slot
Ended = Literal["stop", "length"]


@dataclass(frozen=True)
class Scored:
    """A token and what the model thought of it, where that was asked for."""

    token: int
    logprob: float | None = None  # nats; None for the first of a prompt too
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens there, the likeliest first


@dataclass(frozen=True)
class Piece:
    """What one step gave one text."""

    text_id: int
    text: str  # what became complete
    tokens: tuple[Scored, ...] = ()  # the new one; the end of text, which is none, where it is to be scored
    prompt: tuple[Scored, ...] | None = None  # once, where it was to be scored
    ended: Ended | None = None  # "stop": by an end of text or a stop string


@dataclass
class _Text:
    """A text that is being written, in a slot. Its ids from `start` on are at the positions 0, 1, ... of the cache."""

    text_id: int
    slot: int
    ids: list[int]
    options: Options
    key: np.uint64
    decoder: StreamDecoder
    stops: Stops
    seen_V: np.ndarray | None  # for the repetition penalty
    start: int = 0
    cached: int = 0
    written: int = 0
    scored: list[Scored] = field(default_factory=list)  # of the prompt

    @property
    def scores_prompt(self) -> bool:
        return self.options.score_prompt and self.written == 0

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache yet: the prompt's, or the one that was written last."""
        return len(self.ids) - self.start - self.cached


class Writer:
    """Writes up to `slots` texts at once. For one thread at a time; `close` ends its threads."""

    def __init__(self, model: Weights, slots: int = 1, *, dtype: str = "fp32", threads: int | None = None) -> None:
        """dtype of the weights: "fp32", or "bf16" to read half as much; threads: None takes what the size is worth."""
        self.tokenizer, self.shape = model.tokenizer, model.shape
        self._decoder = Decoder(model.layout, model.params_P, slots=slots, dtype=dtype, threads=threads)
        self.threads, self.close = self._decoder.threads, self._decoder.close
        self._texts: list[_Text] = []
        self._free = list(range(slots))
        self._held: list[list[int]] = [[] for _ in range(slots)]  # the tokens whose keys and values a slot has
        self._scratch = np.empty(SCRATCH_WORDS * self.shape.vocab_size, np.int32)
        self._num_begun = 0

    @property
    def free(self) -> int:
        """Texts that may begin now."""
        return len(self._free)

    @property
    def busy(self) -> bool:
        """Whether a text is being written."""
        return bool(self._texts)

    def begin(self, ids: Sequence[int], options: Options, sample: int = 0) -> int:
        """Take in a text that goes on from a prompt; its id. Samples of equal options differ by their number.

        Raises InputError for a prompt that is empty, does not fit the block or has ids outside of the vocabulary.
        """
        ids = check_prompt(ids, self.shape)
        options.validate()
        assert self._free, "no slot is free"
        slot, cached = self._best_slot(ids[: -1 if not options.score_prompt else 0])
        seen_V = None
        if options.repetition_penalty != 1:
            seen_V = np.zeros(self.shape.vocab_size, bool)
            seen_V[ids] = True
        text = _Text(
            self._num_begun, slot, ids, options, _key(options.seed, sample, ids),
            StreamDecoder(self.tokenizer, ids), Stops(options.stop), seen_V, cached=cached,
        )  # fmt: skip
        self._num_begun += 1
        self._free.remove(slot)
        self._texts.append(text)
        return text.text_id

    def cancel(self, text_id: int) -> None:
        """Give up a text, if it is still being written."""
        for text in self._texts:
            if text.text_id == text_id:
                self._leave(text)
                return

    def step(self) -> list[Piece]:
        """Advance every text by one token, or by a part of its prompt, which gives no piece yet."""
        texts, rows = self._planned()
        if not rows:
            return []
        logits_WV = self._decoder.run(rows)
        pieces, first = [], 0
        for text, some in zip(texts, rows, strict=True):
            text.cached += len(some.ids)
            self._held[text.slot][some.position :] = some.ids
            if some.wanted:
                piece = self._advance(text, logits_WV[first : first + some.wanted])
                first += some.wanted
                if piece is not None:
                    pieces.append(piece)
        return pieces

    def _planned(self) -> tuple[list[_Text], list[Rows]]:
        """What fits one pass: first those that need one more token, then prompts, as far as there is room."""
        rows_left, wanted_left = self._decoder.most_rows, self._decoder.most_wanted
        texts, rows = [], []
        for text in sorted(self._texts, key=lambda text: text.pending > 1):
            scores = text.scores_prompt
            count = min(text.pending, rows_left, wanted_left if scores else rows_left)
            if count < 1 or wanted_left < 1:
                continue
            at = text.start + text.cached
            wanted = count if scores else int(count == text.pending)
            texts.append(text)
            rows.append(Rows(text.slot, text.cached, text.ids[at : at + count], wanted))
            rows_left, wanted_left = rows_left - count, wanted_left - wanted
        return texts, rows

    def _advance(self, text: _Text, logits_WV: np.ndarray) -> Piece | None:
        """The logits behind some of a text's tokens -> its next token; None while the prompt is still being read."""
        options, prompt = text.options, None
        if text.scores_prompt:
            last = text.cached  # as many tokens have logits now
            at = last - len(logits_WV)
            if at == 0:
                text.scored.append(Scored(text.ids[0]))
            for row_V, token in zip(logits_WV, text.ids[at + 1 : last + 1], strict=False):
                text.scored.append(_scored(token, row_V, options.logprobs or 0))
            if text.pending:
                return None
            prompt = tuple(text.scored)
            if options.tokens == 0:
                return self._end(text, "", (), prompt, "length")
        logits_V = logits_WV[-1]
        token = self._choose(text, logits_V)
        if token == self.tokenizer.eot:
            end = () if options.logprobs is None else (_scored(token, logits_V, options.logprobs),)
            return self._end(text, text.stops.feed(text.decoder.finish()), end, prompt, "stop")
        scored = (Scored(token) if options.logprobs is None else _scored(token, logits_V, options.logprobs),)
        text.written += 1
        text.ids.append(token)
        if text.seen_V is not None:
            text.seen_V[token] = True
        shown_text = text.stops.feed(text.decoder.feed(token))
        if text.stops.found:
            return self._end(text, shown_text, scored, prompt, "stop")
        if text.written >= options.tokens:
            return self._end(text, shown_text + text.stops.feed(text.decoder.finish()), scored, prompt, "length")
        if len(text.ids) - text.start > self.shape.block_size:
            text.start, text.cached = len(text.ids) - max(1, self.shape.block_size // 2), 0
        return Piece(text.text_id, shown_text, scored, prompt)

    def _end(
        self, text: _Text, shown_text: str, tokens: tuple[Scored, ...], prompt: tuple[Scored, ...] | None, ended: Ended
    ) -> Piece:
        self._leave(text)
        if not text.stops.found:
            shown_text += text.stops.finish()
        return Piece(text.text_id, shown_text, tokens, prompt, "stop" if text.stops.found else ended)

    def _choose(self, text: _Text, logits_V: np.ndarray) -> int:
        options = text.options
        if text.seen_V is not None:
            logits_V = logits_V.copy()
            seen = logits_V[text.seen_V]
            penalty = np.float32(options.repetition_penalty)
            logits_V[text.seen_V] = np.where(seen > 0, seen / penalty, seen * penalty)
        token = choose_token.call(
            logits_V.ctypes.data, logits_V.size, options.temperature, options.top_k or 0, options.top_p or 1.0,
            options.min_p or 0.0, uniform(text.key, text.written), self._scratch.ctypes.data,
        )  # fmt: skip
        if token < 0:
            raise not_finite()
        return token

    def _leave(self, text: _Text) -> None:
        self._texts.remove(text)
        self._free.append(text.slot)

    def _best_slot(self, ids: list[int]) -> tuple[int, int]:
        """A free slot, and how many of the first ids its cache holds already: copied there where that pays."""
        shared = [_common(held, ids) for held in self._held]
        slot = max(self._free, key=lambda slot: (shared[slot], -len(self._held[slot])))
        best = max(range(len(shared)), key=shared.__getitem__)
        if shared[best] >= shared[slot] + COPIED_FROM:
            self._decoder.copy(best, slot)
            self._held[slot] = self._held[best][: shared[best]]
            return slot, shared[best]
        return slot, shared[slot]


def _key(seed: int, sample: int, ids: list[int]) -> np.uint64:
    """The random numbers of a text: a stream of its own for each seed, sample and prompt."""
    key = np.uint64(key_of(seed, PURPOSE_SAMPLING, sample))  # as a plain int, half of all keys do not fit into 63 bits
    for token in ids:
        key = np.uint64(combine(key, token))
    return key


def _common(held: list[int], ids: list[int]) -> int:
    """The length of the beginning that two lists share."""
    length = 0
    for one, other in zip(held, ids, strict=False):
        if one != other:
            break
        length += 1
    return length


def _scored(token: int, logits_V: np.ndarray, top: int) -> Scored:
    """A token with its log-probability and those of the `top` likeliest."""
    logprobs_V = log_softmax(logits_V)
    best = np.argsort(-logprobs_V, kind="stable")[:top] if top else ()
    return Scored(token, float(logprobs_V[token]), tuple((int(i), float(logprobs_V[i])) for i in best))
