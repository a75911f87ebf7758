"""`cllm-spheres watch RUN`: the dashboard of a run that goes on in another terminal, or has ended."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from cllm_spheres_cli.options import NewestRun, newest


def watch(
    run: NewestRun = None,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of the dashboard.")] = False,
    svg: Annotated[
        Path | None,
        typer.Option(help="Write a picture of the dashboard to this file, and leave.", show_default=False),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Show the run as it is now, and leave.")] = False,
    width: Annotated[
        int | None, typer.Option(min=40, max=400, help="With --svg: columns of the picture. Default: 120.")
    ] = None,
    height: Annotated[
        int | None, typer.Option(min=12, max=200, help="With --svg: lines of the picture. Default: 40.")
    ] = None,
) -> None:
    """Show how a run is going: in another terminal while it trains, or after it has ended.

    Ctrl+C leaves; the run goes on.
    """
    from cllm_spheres.checkpoint.held import Held
    from cllm_spheres.errors import InputError
    from cllm_spheres.watch import dashboard
    from cllm_spheres.watch.follow import Follower, find_run, follow

    if svg is None and (width is not None or height is not None):
        raise InputError("--width and --height are for the picture of --svg: the terminal has a size of its own.")
    run = find_run(newest(run))
    if svg is not None:
        try:
            dashboard.svg(run, svg, width or 120, height or 40)
        except OSError as error:
            raise InputError(f"Cannot write {svg}: {error.strerror}.") from None
        typer.echo(f"Wrote {svg}.")
        return
    try:
        if once:
            with Follower(run, plain=plain or None):
                pass
        else:
            folder = Held(run)  # this run, though it may be renamed and another take its name
            records, waiting = folder.path / "metrics.jsonl", f"waiting for {run / 'metrics.jsonl'}"
            follow(
                folder.path, plain=plain or None, alive=lambda: True, status=lambda: "" if records.exists() else waiting
            )
    except KeyboardInterrupt:
        pass
