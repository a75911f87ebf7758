"""`cllm-spheres prune RUN...`: less disk for runs that have ended."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def prune(
    runs: Annotated[list[Path], typer.Argument(help="The folders of runs that have ended.", show_default=False)],
    weights_only: Annotated[
        bool,
        typer.Option(
            "--weights-only",
            help="Remove the moments of the optimizer too, two thirds of a checkpoint: it writes text, is exported and"
            " is trained further by train --from, but --resume is not possible any more.",
        ),
    ] = False,
) -> None:
    """Remove all checkpoints of runs but the best and the last, and say what that frees.

    A run that goes on is refused, and then nothing is removed from any.
    """
    from cllm_spheres.checkpoint.pruning import check_idle
    from cllm_spheres.checkpoint.pruning import prune as prune_run
    from cllm_spheres.units import plural, size

    for run in runs:
        check_idle(run)
    for run in runs:
        done = prune_run(run, weights_only=weights_only)
        steps = ", ".join(f"{step:,}" + " (best)" * (step == done.best) for step in done.kept)
        print(
            f"{run}: {size(done.freed_bytes)} freed, {plural(len(done.removed), 'checkpoint')} removed."
            f" Left: {size(done.left_bytes)}, step{'s' * (len(done.kept) > 1)} {steps}"
            + (", the weights alone." if weights_only else ".")
        )
