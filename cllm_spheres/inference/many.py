"""Prompts -> their texts, as many at once as a writer has slots; each is given out as it ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cllm_spheres.inference.options import Options
from cllm_spheres.inference.writer import Ended, Piece, Scored, Writer


@dataclass
class Written:
    """A whole text: sample `sample` of prompt `prompt`, both counted from 0."""

    prompt: int
    sample: int
    text: str = ""
    tokens: list[Scored] = field(default_factory=list)
    ended: Ended | None = None
    prompt_tokens: tuple[Scored, ...] | None = None

    def add(self, piece: Piece) -> None:
        """Take in what one step gave."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.ended = piece.ended
        self.prompt_tokens = piece.prompt or self.prompt_tokens


def write_all(writer: Writer, prompts: Sequence[Sequence[int]], options: Options, samples: int) -> Iterator[Written]:
    """`samples` texts for each prompt, in the order in which they end."""
    waiting = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(samples)][::-1]
    texts: dict[int, Written] = {}
    while waiting or writer.busy:
        while writer.free and waiting:
            prompt, sample = waiting.pop()
            texts[writer.begin(prompts[prompt], options, sample)] = Written(prompt, sample)
        for piece in writer.step():
            texts[piece.text_id].add(piece)
            if piece.ended:
                yield texts.pop(piece.text_id)
