"""A run's validation part -> two tasks for EleutherAI's lm-evaluation-harness, as files in a folder.

cllm_continuations   which of four continuations is the one that followed: accuracy, 25 % by chance
cllm_pieces          pieces of text: bits per byte, to stand beside `cllm-spheres eval`
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cllm_spheres.errors import InputError
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.text.tokenizer import REPLACEMENT, Tokenizer

CHOICES = 4
MOST_TRIES = 50  # places looked at for one that is wanted
TASKS = ("cllm_continuations", "cllm_pieces")
_CONTINUATIONS = """\
task: cllm_continuations
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
_PIECES = """\
task: cllm_pieces
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - metric: bits_per_byte
metadata:
  version: 1.0
"""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a context, a continuation and a piece: all of a question fits into the model's block."""

    context: int
    continuation: int
    piece: int

    @classmethod
    def of(cls, block_size: int) -> Lengths:
        """For a model of this block. InputError where nothing fits."""
        if block_size < 8:
            raise InputError(f"The model's block has {block_size} tokens; questions need 8 or more.")
        # One token of room for the end of text before a piece, one for the token that a server writes behind it.
        return cls(block_size // 2, max(1, block_size // 2 - 2), block_size - 2)


def write_tasks(folder: Path, prepared: Prepared, block_size: int, items: int, pieces: int, seed: int = 0) -> None:
    """Both tasks into a folder that exists, each a .yaml and its .jsonl; the same seed asks the same questions."""
    rng, lengths = np.random.default_rng(seed), Lengths.of(block_size)
    texts = _Texts(prepared, rng)
    questions = []
    for _ in range(items):
        context, right = texts.pair(lengths.context, lengths.continuation)
        others = [texts.one(lengths.continuation) for _ in range(CHOICES - 1)]
        label = int(rng.integers(CHOICES))
        questions.append({"context": context, "choices": [*others[:label], right, *others[label:]], "label": label})
    whole = [{"text": texts.one(lengths.piece)} for _ in range(pieces)]
    for name, template, rows in zip(TASKS, (_CONTINUATIONS, _PIECES), (questions, whole), strict=True):
        file = folder.resolve() / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(template.format(file=json.dumps(str(file))))


class _Texts:
    """Places of the validation part whose text has the same tokens when it is encoded again."""

    def __init__(self, prepared: Prepared, rng: np.random.Generator) -> None:
        self.ids, self.rng = prepared.val, rng
        self.tokenizer: Tokenizer = prepared.tokenizer

    def one(self, length: int) -> str:
        """A text of so many tokens."""
        return "".join(self.pair(length, 0))

    def pair(self, first: int, second: int) -> tuple[str, str]:
        """Two texts that follow one another. InputError where there are none."""
        length = first + second
        for _ in range(MOST_TRIES if length < len(self.ids) else 0):
            start = int(self.rng.integers(len(self.ids) - length))
            ids = self.ids[start : start + length].tolist()
            texts = self.tokenizer.decode(ids[:first]), self.tokenizer.decode(ids[first:])
            # The harness moves blanks at the end of a context into the continuation, and encodes both together.
            whole = "".join(texts)
            if (
                self.tokenizer.eot not in ids and REPLACEMENT not in whole and texts[0] == texts[0].rstrip()
                and self.tokenizer.encode(whole) == ids and self.tokenizer.encode(texts[0]) == ids[:first]
            ):  # fmt: skip
                return texts
        raise InputError(
            f"The validation part has {len(self.ids):,} tokens, and no {length} in a row that make a question."
            " Give a run with more text."
        )
