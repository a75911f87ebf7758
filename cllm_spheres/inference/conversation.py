"""Messages of a conversation -> the plain text that a base model goes on from, and where its answer ends.

A model trained here knows no chat format, so turns are written as a play would be (`text/dialogue.py`), and the last
line is "Assistant:". The model writes on from there, and its answer ends before it would speak for the user. Where the
model's block is too small the oldest turns are left out; what the system said and the last turn stay.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cllm_spheres.errors import InputError
from cllm_spheres.text.dialogue import ASSISTANT, SPEAKERS, SYSTEM, Message, turns

STOP = ("\nUser:", "\nAssistant:")


@dataclass(frozen=True)
class Prompt:
    """The text to go on from, the strings before which the answer ends, and how many old messages were left out."""

    text: str
    stop: tuple[str, ...] = STOP
    left_out: int = 0


def written(messages: Sequence[Message]) -> str:
    """All messages as text, ready for the assistant's next words. InputError for an unknown role."""
    return f"{turns(messages)}{SPEAKERS[ASSISTANT]}:"


def prompt_of(
    messages: Sequence[Message], count: Callable[[str], int], block_size: int, reserve: int | None = None
) -> Prompt:
    """The newest messages that fit: at most `block_size` tokens as `count` counts them.

    `reserve` tokens of the block stay free for the answer (default: a quarter of the block), so that it does not push
    the question out of the window; only the last turn alone may take that room too. InputError where there is no
    message, or where even the last one is too long.
    """
    if not messages:
        raise InputError("There is no message: give at least one.")
    room = block_size - min(block_size // 4 if reserve is None else reserve, block_size // 4)
    system = [message for message in messages if message.role == SYSTEM]
    turns = [message for message in messages if message.role != SYSTEM]
    last = max(0, len(turns) - 1)

    def text_from(first: int) -> str:
        return written([*system, *turns[first:]])

    # A shorter conversation has fewer tokens, so halving finds the longest that fits: few counts, however many turns.
    first = bisect.bisect_left(range(last), True, key=lambda first: count(text_from(first)) <= room)
    text = text_from(first)
    if first < last or (length := count(text)) <= block_size:
        return Prompt(text, left_out=first)
    raise InputError(
        f"The last message{' and the system message take' if system else ' takes'} {length} tokens with the words"
        f" around; the model's block has {block_size}. Shorten them, or use a run with a larger --block-size."
    )


class Lead:
    """Cuts the white space with which an answer begins, from pieces that come one by one."""

    def __init__(self) -> None:
        self._begun = False

    def cut(self, piece: str) -> str:
        """The piece, without the blanks before the first word."""
        if self._begun:
            return piece
        piece = piece.lstrip()
        self._begun = bool(piece)
        return piece
