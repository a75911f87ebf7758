"""A loss, an initialisation, a corpus, a preset and a seed -> a run through the library -> a line of a results file.

A line is written when its run has ended; its key names all that its bits depend on. What has a line is not run again,
and a run that was interrupted goes on where it was saved.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cllm_spheres.config import merge, preset_values
from cllm_spheres.crystal.lattice import features
from cllm_spheres.crystal.similarity import nearest
from cllm_spheres.errors import InputError
from cllm_spheres.model.dtypes import choose
from cllm_spheres.text.cache import prepare_cached
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.training.numerics import ARITHMETIC

PLAIN = "cross-entropy"
CRYSTAL, SMOOTHING, RANDOM = SOFT = "crystalline", "smoothing", "random"
USUAL, LATTICE = INITS = "gpt2", "lattice"
ALPHAS = (0.05, 0.1, 0.3)
EVALUATIONS = 10  # of a run: the points of its curve
LAST_STEPS = 50  # training losses are averaged over so many: of one step they are noise
SAMPLE = 256  # tokens of a crystal that is hashed
GCD_WEIGHT, ULAM_WEIGHT, NUM_NEIGHBOURS = 0.7, 0.3, 16
# What the losses with soft targets take besides alpha; stated, so that a change of a default is another key.
NEIGHBOURS = {
    "neighbours": NUM_NEIGHBOURS, "neighbour_temperature": 0.1, "gcd_weight": GCD_WEIGHT, "ulam_weight": ULAM_WEIGHT,
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What is compared: a loss, the weight of its soft targets, and how the embeddings begin."""

    loss: str = PLAIN
    alpha: float | None = None
    init: str = USUAL

    @property
    def plain(self) -> Cell:
        """Cross-entropy with the same initialisation."""
        return Cell(init=self.init)

    @property
    def options(self) -> dict[str, Any]:
        """Those of the training, without what is the default anyway."""
        options: dict[str, Any] = {} if self.init == USUAL else {"init": self.init}
        if self.loss != PLAIN:
            options |= {"loss": self.loss, "alpha": self.alpha}
        if self.loss in (CRYSTAL, RANDOM):
            options |= NEIGHBOURS
        return options

    def __str__(self) -> str:
        return self.loss if self.alpha is None else f"{self.loss} {self.alpha:g}"


def losses(alphas: tuple[float, ...]) -> list[Cell]:
    """Cross-entropy, and every loss with soft targets at every alpha; usual initialisation."""
    return [Cell(), *(Cell(loss, alpha) for loss in SOFT for alpha in alphas)]


@dataclass(frozen=True)
class Corpus:
    """A text by name; the path None is the embedded corpus."""

    name: str
    path: Path | None = None

    def prepared(self, preset: str) -> Prepared:
        """With the tokenizer of a preset, from the cache."""
        values = preset_values(preset)
        tokenizer = values.get("tokenizer", "bpe")
        vocab_size = values["vocab_size"] if tokenizer == "bpe" else None
        return prepare_cached(self.path and [self.path], tokenizer, vocab_size, exact=False)


@dataclass(frozen=True)
class Task:
    """One run."""

    corpus: Corpus
    preset: str
    cell: Cell
    seed: int
    steps: int
    eval_tokens: int
    dtype: str = "auto"
    fingerprint: str = field(default="", compare=False)  # of the prepared text

    @property
    def options(self) -> dict[str, Any]:
        """Those of the training, without where and by how many workers."""
        return {
            "preset": self.preset, "steps": self.steps, "seed": self.seed, "dtype": self.dtype,
            "eval_tokens": self.eval_tokens, "eval_every": math.ceil(self.steps / EVALUATIONS),
            "save_every": self.steps, "keep": 1, **self.cell.options,
        }  # fmt: skip

    @property
    def key(self) -> str:
        """A hash of every option with its default, of the text, and of what the crystal gives. Workers change no bit.

        Another version's arithmetic, rounded differently, is not another experiment; the record has its number.
        """
        config, _ = merge({k: v for k, v in self.options.items() if k not in self.cell.options})
        settings = {k: v for k, v in config.model_dump().items() if k not in _NO_BITS and k not in _OF_A_CELL}
        settings |= {"cell": self.cell.options, "text": self.fingerprint}
        settings["crystal"] = crystal_of(self.cell, config.width)
        settings["dtype"] = choose(self.dtype, config.width)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]

    def __str__(self) -> str:
        return f"{self.corpus.name}, {self.preset}, {self.cell}, {self.cell.init}, seed {self.seed}"


@functools.cache
def crystal_of(cell: Cell, width: int) -> str:
    """A hash of what a cell takes from the crystal, for a small vocabulary: another lattice is another experiment."""
    digest = hashlib.sha256()
    if cell.init == LATTICE:
        digest.update(features(SAMPLE, width).tobytes())
    if cell.loss in (CRYSTAL, RANDOM):
        digest.update(nearest(SAMPLE, NUM_NEIGHBOURS, GCD_WEIGHT, ULAM_WEIGHT)[0].tobytes())
    return digest.hexdigest()


_NO_BITS = ("workers", "save_every", "keep")
_OF_A_CELL = ("loss", "alpha", "init", *NEIGHBOURS)


def tasks(
    corpora: list[Corpus], preset: str, cells: list[Cell], seeds: int, steps: int, eval_tokens: int, dtype: str
) -> list[Task]:
    """Every cell on every corpus with every seed; a seed's runs together, so that any part of the list compares."""
    found = []
    texts = {corpus: corpus.prepared(preset).fingerprint for corpus in corpora}
    for seed in range(1, seeds + 1):
        for corpus in corpora:
            task = Task(corpus, preset, Cell(), seed, steps, eval_tokens, dtype, texts[corpus])
            found += [replace(task, cell=cell) for cell in cells]
    return found


class Records:
    """The results file: a line of JSON a result; several processes may append to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; InputError where the file is something else."""
        try:
            lines = self.path.read_bytes().split(b"\n")[:-1]  # after the last end of line there may be a torn line
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror}.") from None
        records = []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line) if line else {"kind": "nothing"}
                records.append({"kind": record["kind"]} | record)
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{self.path}, line {number} is no result of this benchmark. Give another --out."
                ) from None
        return records

    def runs(self) -> dict[str, dict[str, Any]]:
        """The results of runs by their keys."""
        return {record["key"]: record for record in self.read() if record["kind"] == "run"}

    def costs(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The last measured cost of each preset and dtype."""
        return {(r["preset"], r["dtype"]): r for r in self.read() if r["kind"] == "cost"}

    def append(self, record: dict[str, Any]) -> None:
        """A line, on disk when this returns; what a death left of a line is cut off first."""
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether this process alone may work in a run's folder; held until the end of the block.

    InputError where nothing can be written there.
    """
    path = folder.with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("w")
    except OSError as error:
        raise InputError(f"--work {path.parent} cannot be written: {error.strerror}.") from None
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = path.exists() and path.samefile(f"/proc/self/fd/{file.fileno()}")  # not one that was just removed
        except OSError:
            ours = False
        try:
            yield ours
        finally:
            if ours:
                path.unlink(missing_ok=True)


def train(task: Task, folder: Path, workers: int | None) -> dict[str, Any]:
    """The run, begun or gone on with -> its record; the folder is removed then.

    InputError and RunFailed as `cllm_spheres.train` raises them.
    """
    from cllm_spheres.api import train

    prepared = task.corpus.prepared(task.preset)
    run = None
    if (folder / "config.toml").is_file():
        with contextlib.suppress(InputError):  # nothing was saved yet, or it is damaged: begin anew
            run = train(run=folder, resume=True, quiet=True, workers=workers)
    if run is None:
        shutil.rmtree(folder, ignore_errors=True)
        run = train(prepared.folder, run=folder, quiet=True, workers=workers, **task.options)
    steps, evaluations = run.metrics("step"), run.metrics("eval")
    last, every = steps[-LAST_STEPS:], task.options["eval_every"]
    planned = {*range(0, task.steps, every), task.steps}  # one that was interrupted may have others besides
    record = {
        "kind": "run", "key": task.key, "corpus": task.corpus.name, "preset": task.preset, "loss": task.cell.loss,
        "alpha": task.cell.alpha, "init": task.cell.init, "seed": task.seed, "steps": task.steps,
        "dtype": choose(task.dtype, merge({"preset": task.preset})[0].width), "tokens": evaluations[-1]["tokens"],
        "curve": [[record["step"], record["val_loss"]] for record in evaluations if record["step"] in planned],
        "train_cross_entropy": statistics.fmean(step.get("cross_entropy", step["loss"]) for step in last),
        "seconds": sum(step["seconds"] - step["other_s"] for step in steps), "arithmetic": ARITHMETIC,
    }  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    return record
