"""A preset and a dtype -> the seconds of a step with each loss, measured in turn: of its arithmetic, and of all of it.

The arithmetic is measured call by call (crystal_shard.py). All of a step in short trainings through the library: a
turn's figure is the median of its steps without the first ones, and without what lies between steps; a round is a turn
of each loss, every other round in reverse order.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cllm_spheres_bench import crystal_shard as shard
from cllm_spheres_bench.crystal_grid import PLAIN, Cell, Corpus
from cllm_spheres_bench.machine import commit, cpu_name

from cllm_spheres.model.dtypes import usable

COST_DTYPES = ("fp32", "bf16")
WARM_STEPS = 3
FEWEST_STEPS, MOST_STEPS = 8, 2000  # of a turn


def measure(
    corpus: Corpus, preset: str, dtype: str, cells: list[Cell], *, seconds: float, rounds: int, workers: int | None,
    folder: Path, say: Callable[[str], None],
) -> dict[str, Any] | None:  # fmt: skip
    """A record of the results file; None where this CPU has no such dtype. rounds 0: the arithmetic alone."""
    if usable(dtype) != dtype:
        say(f"{preset}, {dtype}: this CPU has none.")
        return None
    prepared = corpus.prepared(preset)
    load = os.getloadavg()[0]
    arithmetic = shard.summary(shard.measure(corpus, preset, dtype, cells, seconds=seconds * len(cells)))
    shares = ", ".join(f"{loss} {found['ratio'] - 1:+.2%}" for loss, found in arithmetic.items() if loss != PLAIN)
    say(f"{preset}, {dtype}, arithmetic: {shares}")
    steps = 0
    if rounds:
        first = turn(prepared.folder, folder, preset, dtype, Cell(), FEWEST_STEPS, workers)
        steps = min(MOST_STEPS, max(FEWEST_STEPS, math.ceil(seconds / first)))
    turns: dict[str, list[float]] = {cell.loss: [] for cell in cells}
    for number in range(rounds):
        for cell in cells if number % 2 == 0 else cells[::-1]:
            turns[cell.loss].append(turn(prepared.folder, folder, preset, dtype, cell, steps, workers))
        ratios = ", ".join(f"{loss} {ratios_of(turns, loss)[-1]:.3f}" for loss in turns if loss != PLAIN)
        say(f"{preset}, {dtype}, round {number + 1} of {rounds}, {steps} steps a turn: {ratios}")
    return {
        "kind": "cost", "preset": preset, "dtype": dtype, "vocab_size": prepared.vocab_size, "steps": steps,
        "arithmetic": arithmetic, "turns": turns, "workers": workers or "all", "load_before": load,
        "machine": cpu_name(), "commit": commit(), "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }  # fmt: skip


def turn(data: Path, folder: Path, preset: str, dtype: str, cell: Cell, steps: int, workers: int | None) -> float:
    """Median seconds of a step, of a training of `steps` after the warm-up."""
    from cllm_spheres.api import train

    shutil.rmtree(folder, ignore_errors=True)
    steps += WARM_STEPS
    run = train(
        data, run=folder, quiet=True, workers=workers, preset=preset, dtype=dtype, steps=steps, eval_every=steps,
        save_every=steps, eval_tokens=1, **cell.options,
    )  # fmt: skip
    records = run.metrics("step")[WARM_STEPS:]
    shutil.rmtree(folder, ignore_errors=True)
    return statistics.median(record["seconds"] - record["other_s"] for record in records)


def ratios_of(turns: dict[str, list[float]], loss: str) -> list[float]:
    """A loss's seconds over those of cross-entropy in the same round."""
    return [own / plain for own, plain in zip(turns[loss], turns[PLAIN], strict=True)]


def ratio(cost: dict[str, Any] | None, loss: str) -> float | None:
    """Of a loss's arithmetic to that of cross-entropy; None where it was not measured."""
    if loss == PLAIN:
        return 1.0
    found = cost["arithmetic"].get(loss) if cost else None
    return found["ratio"] if found else None
