"""A prepared text -> how often each kind of soft target names the most frequent tokens, beside how often the text does.

A soft target that gives its share to tokens as frequent as those of the text pulls the model towards the frequencies of
the text; one that gives it to any token pulls it towards all tokens alike. That alone may tell two of them apart.
"""

from __future__ import annotations

import numpy as np
from cllm_spheres_bench.crystal_grid import CRYSTAL, RANDOM, SMOOTHING

from cllm_spheres.config import merge
from cllm_spheres.text.frequency import frequency_order
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.training.soft_targets import loss_options, table

MOST_FREQUENT = 100
TEXT = "the text itself"


def shares(prepared: Prepared, preset: str) -> dict[str, float]:
    """Of the text's tokens, and of the share that each loss gives away over the text: what the most frequent get."""
    counts_V = np.bincount(prepared.train, minlength=prepared.vocab_size)
    frequent = np.zeros(prepared.vocab_size, bool)
    frequent[frequency_order(prepared)[0][:MOST_FREQUENT]] = True
    found = {TEXT: counts_V[frequent].sum() / counts_V.sum(), SMOOTHING: frequent.mean()}
    for loss in (CRYSTAL, RANDOM):
        config = merge({"preset": preset, "loss": loss})[0].model_copy(update={"vocab_size": prepared.vocab_size})
        config = config.model_copy(update=loss_options(config, prepared.vocab_size))
        ids_VK, weights_VK = table(config, prepared)
        found[loss] = counts_V @ (weights_VK * frequent[ids_VK]).sum(1) / counts_V.sum()
    return {name: float(found[name]) for name in (TEXT, CRYSTAL, RANDOM, SMOOTHING)}
