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
from cllm_spheres.kernels.sizes import BLOCK
from cllm_spheres.kernels.soft_targets import card
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.workspace import Workspace
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
    params_P = np.tile((rng.standard_normal(BLOCK) * 0.02).astype(np.float32), layout.num_blocks)
    for placed, view in zip(layout.tensors, layout.views(params_P).values(), strict=True):
        if view.ndim == 1:
            view[...] = placed.tensor.constant
    segment_P, workspace = np.zeros(layout.size, np.float32), Workspace(layout, params_P, dtype, largest_shard=count)
    workspace.pack()
    starts = rng.integers(0, len(prepared.train) - length - 1, count)
    ids_BT = np.stack([prepared.train[start : start + length + 1] for start in starts]).astype(np.int32)
    inputs, targets = np.ascontiguousarray(ids_BT[:, :-1]), np.ascontiguousarray(ids_BT[:, 1:])
    cards: dict[str, Any] = {}
    for cell in cells:
        own = config.model_copy(update=cell.options)
        cards[cell.loss] = _card(own.model_copy(update=loss_options(own, prepared.vocab_size)), prepared)

    def call(loss: str) -> float:
        found = cards[loss]
        began = time.thread_time()
        workspace.shard(inputs, targets, segment_P, 1 / inputs.size, soft=found[0].ctypes.data if found else 0)
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
