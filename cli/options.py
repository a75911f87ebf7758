"""Options that several commands share, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NewestRun = Annotated[
    Path | None, typer.Argument(help="The folder of a run. Default: the newest in runs/.", metavar="RUN")
]
CheckpointName = Annotated[
    str | None,
    typer.Option(help="best, last, or a step. Default: best, where validation found one.", metavar="best|last|STEP"),
]
Temperature = Annotated[float, typer.Option(help="0 is greedy; 1 samples what the model believes.")]
TopK = Annotated[int | None, typer.Option(help="Only the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Only the likeliest tokens that reach this probability.")]
MinP = Annotated[
    float | None, typer.Option(help="Only tokens of at least this share of the likeliest one's probability.")
]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 disfavours tokens that are there already; 1 is none.")]
WeightsDtype = Annotated[str, typer.Option(help="Of the weights: bf16 reads half as much.", metavar="fp32|bf16")]
Threads = Annotated[int | None, typer.Option(help="Default: what the model's size is worth, up to all cores.")]


def newest(run: Path | None) -> Path:
    """The run that was given, or the newest in runs/, which is named on standard error. InputError without one."""
    if run is not None:
        return run
    import sys

    from cllm_spheres.inference.model import newest_run

    found = newest_run(Path("runs"))
    print(f"The newest run: {found}", file=sys.stderr)
    return found
