"""A size, and which side trains it -> its speed, its losses and its memory, watched from outside.

Both sides are command-line processes that append one line of JSON a step: ours `cllm-spheres train`, theirs
peer_torch.py. The watcher reads those lines; the window is the wall clock between the ends of two steps, whatever
happened in between, checked against the watcher's own clock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from cllm_spheres_bench.children import child, pss_bytes
from cllm_spheres_bench.peer_torch import Order, Variant
from cllm_spheres_bench.sizes import STEPS, Size, prepare_text

from cllm_spheres.errors import RunFailed
from cllm_spheres.events import Tail
from cllm_spheres.model.layout import Layout
from cllm_spheres.text.prepared import Prepared

NEVER = str(STEPS)  # evaluations and checkpoints: none within a window
SILENCE_S = 1800.0  # max-autotune compiles for many minutes before its first step
POLL_S = 0.05  # seldom: the watcher shares the cores with what it watches
WARM_S, WARM_STEPS = 2.0, 3  # before a window: caches, clocks and the allocator have settled
MEMORY_S, MEMORY_SAMPLES = 2.0, 20  # after a window: how long the memory is sampled, and how often at least
CLOCKS_AGREE_S = 1.0  # between the window by the steps' own times and by the watcher's clock
MOST_TOKENS_PER_S, LONGEST_BESIDES_S = 150_000, 60  # windows are computed for as many steps as PyTorch could make


@dataclass(frozen=True)
class Measured:
    """One turn of one side."""

    tokens_per_s: float
    window_s: float
    window_steps: int
    watched_s: float  # the same window by the watcher's clock
    pss_bytes: dict[str, int]  # the largest sample, by process; empty where the memory was not sampled
    losses: dict[int, float]
    start_s: float  # from the process's start to its first step


@dataclass(frozen=True)
class Inputs:
    """What both sides read, in one folder: the prepared text, and for PyTorch weights, corpus and windows."""

    size: Size
    prepared: Prepared
    folder: Path


def make_inputs(size: Size, folder: Path, seconds: float) -> Inputs:
    """Our first weights and the windows of our batches as files that PyTorch reads.

    The corpus gets one block more at its end, from its beginning, because our windows go round.
    """
    from cllm_spheres.model.initialise import initial_tables, initialise_block
    from cllm_spheres.text.batches import window_start

    prepared = prepare_text(size)
    if prepared.vocab_size != size.vocab_size:
        raise RunFailed(f"The text of {size.name} gave a vocabulary of {prepared.vocab_size}, not {size.vocab_size}.")
    layout, config = Layout(size.shape), size.config
    params_P = np.empty(layout.size, np.float32)
    places, values = initial_tables(layout)
    for block in range(layout.num_blocks):
        initialise_block.call(
            params_P.ctypes.data, places.ctypes.data, values.ctypes.data, len(places), config.seed, block
        )
    from safetensors.numpy import save_file

    save_file(layout.views(params_P), folder / "weights.safetensors")
    ids = np.asarray(prepared.train)
    np.save(folder / "corpus.npy", np.concatenate([ids, ids[: config.block_size + 1]]))
    assert config.batch_size is not None
    steps = int(MOST_TOKENS_PER_S * (seconds + LONGEST_BESIDES_S) / size.tokens) + 100
    starts = np.empty(steps * config.batch_size, np.int64)
    for sequence in range(len(starts)):
        starts[sequence] = window_start(config.seed, sequence, len(ids), config.block_size)
    np.save(folder / "starts.npy", starts.reshape(steps, config.batch_size))
    return Inputs(size, prepared, folder)


@contextmanager
def our_side(
    inputs: Inputs, folder: Path, dtype: str, workers: int, spheres: int, recompute: str = "none"
) -> Iterator[tuple[psutil.Popen, Path]]:
    """`cllm-spheres train` at work; the path of its metrics."""
    size, run = inputs.size, folder / "run"
    arguments = [
        "train", str(inputs.prepared.folder), "--preset", size.preset, "--run", str(run), "--plain",
        "--dtype", dtype, "--workers", str(workers), "--spheres", str(spheres),
        "--batch-size", str(size.config.batch_size), "--steps", str(STEPS), "--warmup", str(size.config.warmup),
        "--eval-every", NEVER, "--save-every", NEVER, "--eval-tokens", str(size.config.block_size),
        "--recompute", recompute,
    ]  # fmt: skip
    with child(
        "cllm_spheres_bench.children", str(os.getpid()), *arguments, errors=folder / "said", environment={}
    ) as process:
        yield process, run / "metrics.jsonl"


@contextmanager
def their_side(inputs: Inputs, folder: Path, variant: Variant) -> Iterator[tuple[psutil.Popen, Path]]:
    """peer_torch.py at work; the path of its metrics."""
    shape, config = inputs.size.shape, inputs.size.config
    assert config.min_lr is not None and config.warmup is not None and config.clip is not None
    metrics = folder / "metrics.jsonl"
    Order(
        variant=vars(variant), vocab_size=shape.vocab_size, block_size=shape.block_size, layers=shape.layers,
        heads=shape.heads, width=shape.width, ff_width=shape.ff_width, bias=shape.bias, lr=config.lr,
        min_lr=config.min_lr, warmup=config.warmup, steps=STEPS, beta1=config.beta1, beta2=config.beta2,
        weight_decay=config.weight_decay, clip=config.clip, weights=str(inputs.folder / "weights.safetensors"),
        corpus=str(inputs.folder / "corpus.npy"), starts=str(inputs.folder / "starts.npy"), metrics=str(metrics),
        parent=os.getpid(),
    ).write(folder / "order.json")  # fmt: skip
    with child(
        "cllm_spheres_bench.peer_torch", str(folder / "order.json"), errors=folder / "said",
        environment={"OMP_NUM_THREADS": str(variant.threads)},
    ) as process:  # fmt: skip
        yield process, metrics


class Watcher:
    """Reads the steps of a side as they appear."""

    def __init__(self, process: psutil.Popen, metrics: Path, said: Path) -> None:
        self.process, self.said = process, said
        self.steps: list[dict[str, Any]] = []
        self.seen_at: list[float] = []  # the watcher's monotonic clock as each step appeared
        self._tail = Tail(metrics)
        self._spoke = time.monotonic()

    def look(self) -> None:
        """Take in what has appeared; RunFailed where the side has ended or says nothing any more."""
        records = [record for record in self._tail.read() if record["kind"] == "step"]
        now = time.monotonic()
        self.steps += records
        self.seen_at += [now] * len(records)
        if records:
            self._spoke = now
        elif (code := self.process.poll()) is not None:
            raise RunFailed(f"it ended with exit code {code}: {self._last_words()}")
        elif now - self._spoke > SILENCE_S:
            raise RunFailed(f"it made no step within {SILENCE_S:.0f} s: {self._last_words()}")

    def _last_words(self) -> str:
        lines = self.said.read_text(errors="replace").strip().splitlines()
        return "\n".join(lines[-12:]) or "it said nothing"

    def wait_for(self, begin: int, steps: int, seconds: float) -> int:
        """The first step at least `steps` and `seconds` after step number `begin` of the list."""
        last = begin + steps
        while True:
            while last < len(self.steps):
                if self.steps[last]["time"] - self.steps[begin]["time"] >= seconds:
                    return last
                last += 1
            time.sleep(POLL_S)
            self.look()


def watch(
    size: Size, process: psutil.Popen, metrics: Path, said: Path, *, seconds: float, until_step: int = 1,
    memory: bool = True,
) -> Measured:  # fmt: skip
    """Warm-up, the window, then the memory; `until_step` belongs to the warm-up.

    The memory is sampled after the window, while the training goes on: reading it slows a process down.
    """
    began = time.monotonic()
    watcher = Watcher(process, metrics, said)
    while not watcher.steps:
        time.sleep(POLL_S)
        watcher.look()
    start_s = time.monotonic() - began
    first = watcher.wait_for(0, max(WARM_STEPS, until_step - 1), min(WARM_S, seconds))
    last = watcher.wait_for(first, 2, seconds)
    window_s = watcher.steps[last]["time"] - watcher.steps[first]["time"]
    watched_s = watcher.seen_at[last] - watcher.seen_at[first]
    if abs(window_s - watched_s) > CLOCKS_AGREE_S:
        raise RunFailed(f"its window took {window_s:.2f} s by its own clock and {watched_s:.2f} s by ours")
    losses = {record["step"]: record["loss"] for record in watcher.steps[: max(1, until_step)]}
    return Measured(
        tokens_per_s=(last - first) * size.tokens / window_s, window_s=window_s, window_steps=last - first,
        watched_s=watched_s, pss_bytes=_peak_pss(watcher) if memory else {}, losses=losses, start_s=start_s,
    )  # fmt: skip


def _peak_pss(watcher: Watcher) -> dict[str, int]:
    """The largest proportional set size of all processes of a side over some seconds and two whole steps."""
    began, begin_step, samples = time.monotonic(), len(watcher.steps), []
    while (
        time.monotonic() - began < MEMORY_S or len(watcher.steps) < begin_step + 3 or len(samples) < MEMORY_SAMPLES
    ):  # fmt: skip
        samples.append(pss_bytes(watcher.process))
        time.sleep(POLL_S)
        watcher.look()
    return max(samples, key=lambda sample: sum(sample.values()))
