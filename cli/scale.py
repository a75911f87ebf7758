"""`cllm-spheres scale RUN --workers N`: another number of workers for a run that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def scale(
    run: Annotated[Path, typer.Argument(help="The folder of a run that goes on.", show_default=False)],
    workers: Annotated[int, typer.Option(min=1, help="Worker processes, at most the run's spheres.")],
) -> None:
    """Change how many workers a run has, between two of its steps. Its bits stay the same.

    The run keeps the number for a later --resume.
    """
    from cllm_spheres.training.control import ask
    from cllm_spheres.watch.follow import find_run

    print(ask(find_run(run), {"workers": workers}))
