"""A step or an evaluation that was not finite -> the sentence that says where, and the command that can mend it."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np

from cllm_spheres.checkpoint.files import Damaged
from cllm_spheres.checkpoint.store import Store
from cllm_spheres.config import Config
from cllm_spheres.model.layout import Layout
from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres.memory import SharedMemory

LOWER = 3  # times lower is the learning rate that is advised, and at most the default


def explain_nonfinite(memory: SharedMemory, layout: Layout, step: int) -> str:
    """Which sphere and which tensor were the first that were not finite, read from the segments of `step`."""
    if name := _broken(memory, layout):
        return f"Step {step}: the weights themselves are not finite, first in {name}."
    losses = memory.sphere_words().view(np.float64)[:, M.P_LOSS]
    for sphere in range(memory.sizes.num_spheres):
        for name, view in layout.views(memory.segment(sphere)).items():
            if not np.isfinite(view).all():
                return (
                    f"Step {step}: the gradient of sphere {sphere} is not finite, first in {name}"
                    f" (its loss is {losses[sphere]:.6g})."
                )
        if not np.isfinite(losses[sphere]):
            return f"Step {step}: the loss of sphere {sphere} is not finite, though its gradient is."
    return f"Step {step}: the gradient's norm is not finite, though every segment is: it is too large."


def explain_evaluation(memory: SharedMemory, layout: Layout, step: int, losses: np.ndarray) -> str:
    """The first window of the evaluation after `step` whose loss is not finite, and the largest weight.

    losses: of each window.
    """
    window = int(np.argmin(np.isfinite(losses)))
    what = f"The evaluation after step {step}: the loss of window {window} is {losses[window]:.6g}"
    if name := _broken(memory, layout):
        return f"{what}. The weights themselves are not finite, first in {name}."
    largest = {name: float(np.abs(view).max()) for name, view in layout.views(memory.params).items()}
    name = max(largest, key=lambda name: largest[name])
    return f"{what}, though the weights are finite: the largest is {largest[name]:.3g}, in {name}."


def _broken(memory: SharedMemory, layout: Layout) -> str | None:
    """The first tensor of the weights that is not finite."""
    return next((name for name, view in layout.views(memory.params).items() if not np.isfinite(view).all()), None)


def way_out(run: Path, store: Store, config: Config) -> str:
    """What can work after such an end, with a command to type: a resume would compute the same numbers again.

    run: the folder as it is called.
    """
    good = _good_checkpoint(store)
    lr = min(config.lr / LOWER, Config.model_fields["lr"].default)
    words = ["cllm-spheres", "train", "--config", str(run / "config.toml")]
    words += ["--from", str(run / "checkpoints" / good)] if good else []
    words += ["--init", "gpt2"] if good and config.init != "gpt2" else []
    words += ["--lr", f"{lr:.2g}"] + (["--min-lr", f"{lr / 10:.2g}"] if (config.min_lr or 0) > lr else [])
    words += ["--run", str(_free_name(run))]
    return (
        f"Often the learning rate is too high, and --resume would compute the same again. Begin anew"
        f"{' from the best checkpoint' if good else ''} with a lower one:\n  {shlex.join(words)}\n"
        "A longer --warmup helps where it happens early; --on-nonfinite skip leaves such steps out."
    )


def _good_checkpoint(store: Store) -> str | None:
    """The name of the best checkpoint, where it is whole and finite; a later one may be on its way to this end."""
    best = store.best_step()
    if best is None:
        return None
    try:
        saved = store.load(best, optimizer=False)
        return saved.path.name if all(np.isfinite(tensor).all() for _, tensor in saved.model_tensors()) else None
    except Damaged:
        return None


def _free_name(run: Path) -> Path:
    """RUN-2, or the next that does not exist."""
    number = 2
    while (path := run.with_name(f"{run.name}-{number}")).exists():
        number += 1
    return path
