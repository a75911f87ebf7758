"""`cllm-spheres runs [FOLDER]`: a table of the runs in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def runs(
    folder: Annotated[Path, typer.Argument(help="The folder that the runs are in.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects, with more fields.")] = False,
) -> None:
    """Show the runs in a folder: how each stands, how far it came, and what it takes on the disk.

    The one that changed last stands at the end.
    """
    import json
    from dataclasses import asdict

    from cllm_spheres.units import compact, fixed, size
    from cllm_spheres.watch.overview import overviews
    from cllm_spheres.watch.paint import clean

    found = overviews(folder)
    if as_json:
        print(json.dumps([asdict(run) for run in found], indent=1))
        return
    if not found:
        print(f"There is no run in {folder}. Train one: cllm-spheres train")
        return

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in ("run", "state"):
        table.add_column(name, overflow="fold")
    for name in ("step", "loss", "validation", "best", "tokens/s", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in found:
        step = "\u2013" if run.step is None else f"{run.step:,}" + (f"/{run.steps:,}" if run.steps else "")
        numbers = (step, fixed(run.loss), fixed(run.val_loss), fixed(run.best_val_loss), compact(run.tokens_per_s))
        table.add_row(Text(clean(run.name)), run.state, *numbers, size(run.size_bytes))
    Console().print(table)
