"""A preset and a dtype -> the arithmetic of a step with each loss, on one core, call by call in turn.

The work of one sphere: forward and backward of its sequences, without what is the same for every loss: gathering,
updating, packing, waiting. Losses take turns within milliseconds, and the thread's own processor time is counted, so
that what else the machine does falls on all of them alike.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import numpy as np
from cllm_spheres_bench.crystal_grid import PLAIN, SMOOTHING, Cell, Corpus

from cllm_spheres.config import merge
from cllm_spheres.kernels.sizes import BLOCK, PROGRESS_WORDS
from cllm_spheres.kernels.soft_targets import card
from cllm_spheres.model import dtypes
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.workspace import new_arena
from cllm_spheres.training.plan import shape_of
from cllm_spheres.training.soft_targets import loss_options, table

FEWEST_ROUNDS, MOST_ROUNDS = 10, 3000
SEED = 5


def summary(taken: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Of each loss the median seconds, and the median ratio to cross-entropy in the same round, with its interval.

    low and high hold the true median with 95 %, whatever the distribution: the order statistics n/2 -+ 0.98 sqrt(n).
    """
    found = {}
    for loss, seconds in taken.items():
        ratios = sorted(own / plain for own, plain in zip(seconds, taken[PLAIN], strict=True))
        n = len(ratios)
        first = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
        found[loss] = {
            "seconds": statistics.median(seconds), "ratio": statistics.median(ratios), "low": ratios[first],
            "high": ratios[n - 1 - first], "rounds": n,
        }  # fmt: skip
    return found


def measure(corpus: Corpus, preset: str, dtype: str, cells: list[Cell], *, seconds: float) -> dict[str, list[float]]:
    """Seconds of every call, by loss; a round is a call of each, in an order drawn by lot. `seconds`: all rounds."""
    prepared = corpus.prepared(preset)
    config = merge({"preset": preset})[0].model_copy(update={"vocab_size": prepared.vocab_size})
    config = config.model_copy(update={"ff_width": config.ff_width or 4 * config.width})
    assert config.batch_size and config.spheres
    layout, rng = Layout(shape_of(config)), np.random.default_rng(SEED)
    count, length = -(-config.batch_size // config.spheres), config.block_size
    shape_on_card = dtypes.geometry(layout, dtype, largest_shard=count)
    entries = dtypes.entries(dtype)
    packed_bytes, units = dtypes.packed_sizes(layout, dtype)
    params_P = np.tile((rng.standard_normal(BLOCK) * 0.02).astype(np.float32), layout.num_blocks)
    for name, view in layout.views(params_P).items():
        if view.ndim == 1:
            view[...] = name.endswith("weight")
    segment_P, progress = np.zeros(layout.size, np.float32), np.zeros(PROGRESS_WORDS, np.int64)
    arena, packed = new_arena(shape_on_card.arena_floats), new_arena(-(-packed_bytes // 4))
    for unit in range(units):
        assert entries.pack_unit is not None
        entries.pack_unit.call(shape_on_card.array.ctypes.data, params_P.ctypes.data, packed.ctypes.data, unit)
    starts = rng.integers(0, len(prepared.train) - length - 1, count)
    ids_BT = np.stack([prepared.train[start : start + length + 1] for start in starts]).astype(np.int32)
    inputs, targets = np.ascontiguousarray(ids_BT[:, :-1]), np.ascontiguousarray(ids_BT[:, 1:])
    plain = np.zeros(1, np.float64)
    cards: dict[str, Any] = {}
    for cell in cells:
        own = config.model_copy(update=cell.options)
        cards[cell.loss] = _card(own.model_copy(update=loss_options(own, prepared.vocab_size)), prepared)

    def call(loss: str) -> float:
        found = cards[loss]
        began = time.thread_time()
        entries.compute_shard.call(
            shape_on_card.array.ctypes.data, params_P.ctypes.data, packed.ctypes.data, segment_P.ctypes.data,
            arena.ctypes.data, inputs.ctypes.data, targets.ctypes.data, count, length, 1 / inputs.size, 0, 0,
            found[0].ctypes.data if found else 0, plain.ctypes.data, progress.ctypes.data,
        )  # fmt: skip
        return time.thread_time() - began

    for loss in cards:
        warm_s = call(loss)
    rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, math.ceil(seconds / warm_s / len(cards))))
    taken: dict[str, list[float]] = {loss: [] for loss in cards}
    for _ in range(rounds):
        for place in rng.permutation(len(cells)):
            taken[cells[place].loss].append(call(cells[place].loss))
    return taken


def _card(config: Any, prepared: Any) -> tuple[Any, ...]:
    """A card for the kernels with what it points to; empty for cross-entropy."""
    if config.loss == PLAIN:
        return ()
    if config.loss == SMOOTHING:
        return (card(config.alpha, 0, 0, 0),)
    ids_VK, weights_VK = table(config, prepared)
    return card(config.alpha, config.neighbours, ids_VK.ctypes.data, weights_VK.ctypes.data), ids_VK, weights_VK
