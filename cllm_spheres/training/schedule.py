"""(step, configuration) -> learning rate, float64. Steps count from 1; the last one is `steps`."""

from __future__ import annotations

import math

from cllm_spheres.config import Config
from cllm_spheres.crystal.functions import elementary

WSD_DECAY = 0.2  # the share of a run in which wsd decays


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up to `lr`, which the last warm-up step reaches; then the schedule, ending at `min_lr`.

    Sources: cosine: Loshchilov and Hutter, SGDR (2017); wsd: Hu et al., MiniCPM (2024).
    """
    assert config.steps is not None and config.warmup is not None and config.min_lr is not None
    if step <= config.warmup:
        return config.lr * step / config.warmup
    if config.schedule == "constant":
        return config.lr
    begin = config.warmup
    if config.schedule == "wsd":
        begin = max(begin, config.steps - max(1, round(config.steps * WSD_DECAY)))
        if step <= begin:
            return config.lr
    share = min(1.0, (step - begin) / max(1, config.steps - begin))
    if config.schedule == "cosine":
        share = 0.5 - 0.5 * elementary.cos(math.pi * share)
    return config.lr + (config.min_lr - config.lr) * share
