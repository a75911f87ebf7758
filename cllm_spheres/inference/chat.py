"""What a user says, turn by turn -> the answers, piece by piece, with the conversation so far as their prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from cllm_spheres.errors import InputError
from cllm_spheres.inference.conversation import Lead, prompt_of
from cllm_spheres.inference.model import Model
from cllm_spheres.inference.options import Options
from cllm_spheres.text.dialogue import ASSISTANT, SYSTEM, USER, Message

if TYPE_CHECKING:
    from cllm_spheres.inference.writer import Writer


class Chat:
    """One conversation. The writer's cache still holds its beginning, so that only what is new is read."""

    def __init__(self, model: Model, writer: Writer, options: Options, system: str | None = None) -> None:
        """options: how answers are written; what ends an answer is added to their stop strings."""
        self.options = options.validate()
        self.system = system
        self.turns: list[Message] = []  # the user's and the model's in turn
        self.left_out = 0  # turns that no longer fit the model's block
        self._model, self._writer = model, writer
        self._sample = 0

    def say(self, text: str) -> Iterator[str]:
        """The answer to the next turn. InputError, and nothing changed, where it does not fit the model's block."""
        return self._answer([*self.turns, Message(USER, text)], 0)

    def again(self) -> Iterator[str]:
        """Another answer to the last turn."""
        if not self.turns:
            raise InputError("There is nothing to answer yet.")
        return self._answer(self.turns[:-1], self._sample + 1)

    def undo(self) -> None:
        """Forget the last turn and its answer."""
        del self.turns[-2:]

    def forget(self) -> None:
        """Begin anew."""
        self.turns, self.left_out = [], 0

    def _answer(self, turns: list[Message], sample: int) -> Iterator[str]:
        system = [Message(SYSTEM, self.system)] if self.system else []
        prompt = prompt_of(
            [*system, *turns], lambda text: len(self._model.encode(text)), self._model.shape.block_size,
            self.options.tokens,
        )  # fmt: skip
        options = replace(self.options, stop=(*self.options.stop, *prompt.stop))
        text_id = self._writer.begin(self._model.encode(prompt.text), options, sample)
        return self._written(turns, prompt.left_out, sample, text_id)

    def _written(self, turns: list[Message], left_out: int, sample: int, text_id: int) -> Iterator[str]:
        lead, answer = Lead(), ""
        try:
            while self._writer.busy:
                for piece in self._writer.step():
                    if text := lead.cut(piece.text):
                        answer += text
                        yield text
        finally:  # also where the reader had enough: what was said counts
            self._writer.cancel(text_id)
            self.turns, self.left_out, self._sample = [*turns, Message(ASSISTANT, answer.rstrip())], left_out, sample
