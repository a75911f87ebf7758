"""`cllm-spheres scale RUN --workers N`: another number of workers for a run that goes on."""

from __future__ import annotations

from typing import Annotated

import typer
from cllm_spheres_cli.options import NewestRun, newest


def scale(
    run: NewestRun = None,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes, at most the run's spheres.")] = ...,  # type: ignore[assignment]
) -> None:
    """Change how many workers a run has, between two of its steps. Its bits stay the same.

    The run keeps the number for a later --resume.
    """
    import sys

    from cllm_spheres.training.control import ask
    from cllm_spheres.watch.follow import find_run

    def waiting() -> None:
        print("Waiting until the step and what else is under way have ended ...", file=sys.stderr)

    try:
        print(ask(find_run(newest(run)), {"workers": workers}, waiting))
    except KeyboardInterrupt:
        print("The number of workers stays as it is.", file=sys.stderr)
        raise typer.Exit(130) from None
