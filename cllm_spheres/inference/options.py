"""How one text is written: the options of `generate`, of the library and of the server, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from cllm_spheres.errors import InputError, nearest, shown
from cllm_spheres.model.shape import Shape

MOST_TOKENS = 10**7
MOST_STOPS, LONGEST_STOP = 16, 1000
MOST_LOGPROBS = 100
REPETITION_PENALTIES = 0.01, 100


@dataclass(frozen=True)
class Options:
    """How one text is written. Of equal options and equal prompts come equal texts, whatever is written beside them."""

    tokens: int = 200  # at most so many new ones
    temperature: float = 0.8  # 0: always the likeliest
    top_k: int | None = None
    top_p: float | None = None  # Holtzman et al. 2020, The Curious Case of Neural Text Degeneration
    min_p: float | None = None  # a share of the likeliest token's probability: Nguyen et al. 2024, Min-p Sampling
    repetition_penalty: float = 1.0  # Keskar et al. 2019, CTRL: of tokens that the prompt or the text has already
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    seed: int = 1337
    logprobs: int | None = None  # the log-probability of each token, and so many of the likeliest with theirs
    score_prompt: bool = False  # those of the prompt's tokens too; then `tokens` may be 0

    def validate(self) -> Options:
        """Itself. Raises InputError, one line for each option that cannot work."""
        wrong = []
        if not (is_number(self.temperature) and self.temperature >= 0):
            wrong.append(
                f"--temperature {shown(self.temperature)} must be 0 (always the likeliest token) or above, and finite."
            )
        if self.top_k is not None and not (is_whole(self.top_k) and self.top_k >= 1):
            wrong.append(f"--top-k {shown(self.top_k)} must be 1 or above; leave it out to keep all tokens.")
        for name, value in (("--top-p", self.top_p), ("--min-p", self.min_p)):
            if value is not None and not (is_number(value) and 0 < value <= 1):
                wrong.append(f"{name} {shown(value)} must be above 0 and at most 1; leave it out to keep all tokens.")
        low, high = REPETITION_PENALTIES
        if not (is_number(self.repetition_penalty) and low <= self.repetition_penalty <= high):
            wrong.append(f"--repetition-penalty {shown(self.repetition_penalty)} must be {low} to {high}; 1 is none.")
        least = 0 if self.score_prompt else 1
        if not (is_whole(self.tokens) and least <= self.tokens <= MOST_TOKENS):
            wrong.append(f"--tokens {shown(self.tokens)} must be {least} or above, at most {MOST_TOKENS:,}.")
        if not (is_whole(self.seed) and 0 <= self.seed < 2**63):
            wrong.append(f"The seed is {shown(self.seed)}: give 0 to {2**63 - 1}.")
        if self.logprobs is not None and not (is_whole(self.logprobs) and 0 <= self.logprobs <= MOST_LOGPROBS):
            wrong.append(f"logprobs {shown(self.logprobs)} must be 0 to {MOST_LOGPROBS}.")
        if isinstance(self.stop, str) or not all(isinstance(stop, str) for stop in self.stop):
            wrong.append(f"stop is {shown(self.stop)}: give a list of texts.")
        elif "" in self.stop or len(self.stop) > MOST_STOPS or max(map(len, self.stop), default=0) > LONGEST_STOP:
            wrong.append(f"--stop takes up to {MOST_STOPS} texts of 1 to {LONGEST_STOP:,} characters each.")
        if wrong:
            raise InputError("\n".join(wrong))
        return self


def check_prompt(ids: Sequence[int], shape: Shape) -> list[int]:
    """The ids of a prompt as plain integers; InputError where it is empty, too long, or has ids that do not exist."""
    if not len(ids):
        raise InputError("The prompt has no tokens: begin with the end of text.")
    if len(ids) > shape.block_size:
        raise InputError(f"The prompt has {len(ids):,} tokens, and the model's block {shape.block_size:,}: shorten it.")
    for i in ids:
        if not isinstance(i, int | np.integer) or isinstance(i, bool) or not 0 <= i < shape.vocab_size:
            raise InputError(f"The prompt holds the token {shown(i)}; the vocabulary is 0 to {shape.vocab_size - 1}.")
    return [int(i) for i in ids]


def is_whole(value: object) -> bool:
    """Whether it is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a finite int or float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def options_of(given: Mapping[str, Any]) -> Options:
    """Keyword arguments as Options, checked; `stop` may be one text. InputError names the nearest option."""
    names = [field.name for field in fields(Options)]
    for name in given:
        if name not in names:
            raise InputError(f"There is no option {shown(name)}: {nearest(name, names)}")
    stop = given.get("stop", ())
    try:
        stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
    except TypeError:
        raise InputError(f"stop is {shown(stop)}: give a list of texts.") from None
    return Options(**{**given, "stop": stop}).validate()
