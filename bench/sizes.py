"""The name of a size, S1 to S5 -> the model, its batch, its text and the arithmetic of one token."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cllm_spheres.config import Config, build, preset_values
from cllm_spheres.errors import InputError, nearest
from cllm_spheres.model.shape import Shape
from cllm_spheres.text.cache import cache_folder, prepare_cached
from cllm_spheres.text.prepared import Prepared

STEPS = 1_000_000  # the horizon of the schedule: no run reaches its end
WARMUP = 10  # so that the losses have moved by the step where they are compared
NUM_CHARACTERS = 64  # of S2's text: with the end of text a vocabulary of 65


@dataclass(frozen=True)
class Size:
    """A configuration that is compared: a preset and its vocabulary."""

    name: str
    preset: str
    tokenizer: str
    vocab_size: int

    @property
    def config(self) -> Config:
        """The preset with this vocabulary and a schedule that no run outlives."""
        values = preset_values(self.preset) | {"vocab_size": self.vocab_size, "steps": STEPS, "warmup": WARMUP}
        values["tokenizer"] = self.tokenizer
        config = build(values)
        return build(config.model_dump() | {"min_lr": config.lr / 10})

    @property
    def shape(self) -> Shape:
        c = self.config
        return Shape(
            self.vocab_size, c.block_size, c.layers, c.heads, c.width, c.ff_width or 4 * c.width, c.bias
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        assert self.config.batch_size is not None
        return self.config.batch_size * self.config.block_size

    def describe(self) -> str:
        """The sizes in one line."""
        s = self.shape
        return (
            f"vocabulary {s.vocab_size:,}, width {s.width}, {s.layers} layers, {s.heads} heads, feed-forward"
            f" {s.ff_width}, {self.config.batch_size} x {s.block_size} tokens"
        )


SIZES = {
    size.name: size
    for size in (
        Size("S1", "tiny", "bpe", 381),
        Size("S2", "small", "char", 65),
        Size("S3", "medium", "bpe", 4096),
        Size("S4", "large", "bpe", 8192),
        Size("S5", "gpt2", "bpe", 50304),
    )
}


def chosen_sizes(words: str) -> list[Size]:
    """Names between commas, such as S2,S3 -> the sizes; InputError names the nearest known one."""
    names = [word.strip().upper() for word in words.split(",") if word.strip()]
    for name in names:
        if name not in SIZES:
            raise InputError(f"--sizes: there is no {name!r}: {nearest(name, SIZES)}")
    if not names:
        raise InputError(f"--sizes names none: known are {', '.join(SIZES)}.")
    return [SIZES[name] for name in dict.fromkeys(names)]


def prepare_text(size: Size) -> Prepared:
    """The text of a size: the standard library's source; for characters with all but the most frequent as spaces."""
    if size.tokenizer != "char":
        return prepare_cached(None, size.tokenizer, size.vocab_size)
    path = cache_folder().parent / f"bench-{NUM_CHARACTERS}-characters.txt"
    if not path.exists():
        write_characters(path, NUM_CHARACTERS)
    return prepare_cached([path], size.tokenizer)


def write_characters(path: Path, count: int) -> None:
    """Write the standard library's source in its `count` most frequent characters, the space among them."""
    from cllm_spheres.text.embedded import embedded_files

    text = "\n".join(Path(file).read_text(encoding="utf-8", errors="ignore") for file in embedded_files().paths)
    kept = {character for character, _ in Counter(text).most_common(count)}
    assert " " in kept
    text = text.translate({ord(character): " " for character in set(text) - kept})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".writing")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
