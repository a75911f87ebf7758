"""A step that was not finite -> the sentence that says where the first such number stands."""

from __future__ import annotations

import numpy as np

from cllm_spheres.model.layout import Layout
from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres.memory import SharedMemory


def explain_nonfinite(memory: SharedMemory, layout: Layout, step: int) -> str:
    """Which sphere and which tensor were the first that were not finite, read from the segments of `step`."""
    advice = (
        " Often the learning rate is too high: try a smaller --lr or a longer --warmup;"
        " --on-nonfinite skip leaves such steps out."
    )
    for name, view in layout.views(memory.params).items():
        if not np.isfinite(view).all():
            return f"Step {step}: the weights themselves are not finite, first in {name}." + advice
    losses = memory.sphere_words().view(np.float64)[:, M.P_LOSS]
    for sphere in range(memory.sizes.num_spheres):
        for name, view in layout.views(memory.segment(sphere)).items():
            if not np.isfinite(view).all():
                return (
                    f"Step {step}: the gradient of sphere {sphere} is not finite, first in {name}"
                    f" (its loss is {losses[sphere]:.6g})." + advice
                )
        if not np.isfinite(losses[sphere]):
            return f"Step {step}: the loss of sphere {sphere} is not finite, though its gradient is." + advice
    return f"Step {step}: the gradient's norm is not finite, though every segment is: it is too large." + advice
