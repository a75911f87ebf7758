"""The spooled text and the wanted size -> a tokenizer: counted or trained, streaming."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cllm_spheres.errors import InputError, nearest
from cllm_spheres.text.spool import Part
from cllm_spheres.text.tokenizer import (
    KINDS,
    MIN_BPE,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    WordTokenizer,
    load_tokenizer,
)

DEFAULT_BPE = 1024  # as the preset small; fewer where the text gives no more
DEFAULT_WORDS = 65_536  # the most that 16-bit ids can name
MAX_VOCAB = 2**31
SAMPLE_BYTES = 64 << 20  # text on which bpe is trained: 8k tokens take about ten seconds on two cores
SAMPLE_RANGE_BYTES = 1 << 20
MAX_WORDS = 5_000_000  # words counted at a time; beyond it those seen once are forgotten

RunTasks = Callable[[list[dict[str, Any]], str], Iterator[dict[str, Any]]]  # tasks, stage -> results in order


def check_vocabulary(kind: str, vocab_size: int | None) -> None:
    """InputError for a tokenizer that does not exist, or a size that no text can give it."""
    if kind not in KINDS:
        raise InputError(f"There is no tokenizer {kind!r}: {nearest(kind, KINDS)}")
    if vocab_size is None:
        return
    if kind == "byte" and vocab_size != ByteTokenizer.vocab_size:
        raise InputError(
            f"--vocab-size {vocab_size}: the byte tokenizer always has {ByteTokenizer.vocab_size} tokens "
            "(256 bytes and end of text). Leave --vocab-size out, or take --tokenizer bpe."
        )
    least = {"bpe": MIN_BPE, "word": 3}.get(kind, 1)
    if not least <= vocab_size <= MAX_VOCAB:
        why = {"bpe": "256 bytes and end of text", "word": "one word, unknown and end of text"}.get(kind, "")
        raise InputError(f"--vocab-size {vocab_size}: {kind} can have {least} ({why}) to {MAX_VOCAB:,} tokens.")


def make_tokenizer(
    kind: str,
    vocab_size: int | None,
    exact: bool,
    work: Path,
    train: Part,
    ranges: dict[str, list[tuple[int, int]]],
    run: RunTasks,
) -> tuple[Tokenizer, list[str]]:
    """A tokenizer for the spooled parts, and notes on how it was made. InputError where the size cannot be.

    `exact`: a vocab_size that the text cannot give is an InputError; else the most it gives is taken.
    `ranges` are the units of text of each part. char sees all characters; word and bpe learn from the
    training part alone.
    """
    if kind == "byte":
        return ByteTokenizer(), []
    if kind == "char":
        return _char(vocab_size, work, ranges, run), []
    if kind == "word":
        return _word(vocab_size, exact, work, ranges["train"], run)
    return _bpe(vocab_size, exact, work, train, run)


def _char(vocab_size: int | None, work: Path, ranges: dict[str, list[tuple[int, int]]], run: RunTasks) -> Tokenizer:
    tasks: list[dict[str, Any]] = [
        {"do": "characters", "work": str(work), "part": part, "low": low, "high": high}
        for part, bounds in ranges.items()
        for low, high in bounds
    ]
    seen: set[str] = set()
    for result in run(tasks, "vocabulary"):
        seen.update(result["characters"])
    tokenizer = CharTokenizer(seen)
    if vocab_size not in (None, tokenizer.vocab_size):
        raise InputError(
            f"--vocab-size {vocab_size}: this text has {tokenizer.vocab_size - 1} different characters, "
            f"with end of text a vocabulary of {tokenizer.vocab_size}. Leave --vocab-size out, or take "
            "--tokenizer bpe."
        )
    return tokenizer


def _word(
    vocab_size: int | None, exact: bool, work: Path, bounds: list[tuple[int, int]], run: RunTasks
) -> tuple[Tokenizer, list[str]]:
    tasks: list[dict[str, Any]] = [
        {
            "do": "words",
            "work": str(work),
            "part": "train",
            "low": low,
            "high": high,
            "out": str(work / f"{i}.words"),
        }
        for i, (low, high) in enumerate(bounds)
    ]
    counts: Counter[str] = Counter()
    notes = []
    for task, _ in zip(tasks, run(tasks, "vocabulary"), strict=True):
        path = Path(task["out"])
        counts.update(json.loads(path.read_text()))
        path.unlink()
        if len(counts) > MAX_WORDS:
            counts = Counter({word: count for word, count in counts.items() if count > 1})
            notes = [f"Words were counted {MAX_WORDS:,} at a time: rare ones may be missing."]
    if exact and vocab_size is not None and vocab_size > len(counts) + 2:
        raise InputError(
            f"--vocab-size {vocab_size} is more than the text gives: its training part has {len(counts)} "
            f"different words. Give --vocab-size {len(counts) + 2} (with unknown and end of text) or less."
        )
    most = (vocab_size or DEFAULT_WORDS) - 2
    words = sorted(counts, key=lambda word: (-counts[word], word))[:most]
    return WordTokenizer(words), notes


def _bpe(vocab_size: int | None, exact: bool, work: Path, train: Part, run: RunTasks) -> tuple[Tokenizer, list[str]]:
    total = train.size
    num_ranges = min(-(-total // SAMPLE_RANGE_BYTES), SAMPLE_BYTES // SAMPLE_RANGE_BYTES)
    length = min(SAMPLE_RANGE_BYTES, -(-total // num_ranges))
    starts = [(total - length) * i // max(num_ranges - 1, 1) for i in range(num_ranges)]
    ranges = [(start, start + length) for start in starts]
    notes = []
    if total <= SAMPLE_BYTES:
        ranges = [(0, total)]
    else:
        notes.append(
            f"bpe was trained on a sample: {num_ranges} pieces evenly over the training text, "
            f"{num_ranges * length / 1e6:,.0f} of {total / 1e6:,.0f} MB."
        )
    out = work / "bpe.json"
    # No text gives more than a merge a byte, and the library takes memory for what it is asked for.
    wanted = min(vocab_size or DEFAULT_BPE, MIN_BPE + total)
    task = {"do": "train_bpe", "work": str(work), "part": "train", "vocab_size": wanted, "ranges": ranges}
    (result,) = run([task | {"out": str(out)}], "vocabulary")
    if exact and vocab_size is not None and result["vocab_size"] < vocab_size:
        raise InputError(
            f"--vocab-size {vocab_size} is more than the text gives: bpe finds {result['vocab_size']} "
            f"tokens in it. Give --vocab-size {result['vocab_size']} or less, or more text."
        )
    return load_tokenizer(out), notes
