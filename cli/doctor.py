"""`cllm-spheres doctor`: what this machine offers and lacks for a training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cllm_spheres.config import PRESETS

if TYPE_CHECKING:
    from rich.console import Console

    from cllm_spheres.doctor.finding import Finding

_COLOURS = {"ok": "green", "note": "yellow", "bad": "bold red"}
_STATE, _CHECK = 4, 15  # columns


def doctor(
    preset: Annotated[
        str | None, typer.Option(help="The size to look at. Default: small.", metavar="|".join(PRESETS))
    ] = None,
    spheres: Annotated[int | None, typer.Option(help="As for train.", show_default=False)] = None,
    workers: Annotated[int | None, typer.Option(help="As for train.", show_default=False)] = None,
    dtype: Annotated[
        str | None, typer.Option(help="As for train. Default: auto.", metavar="auto|fp32|bf16", show_default=False)
    ] = None,
    run: Annotated[Path, typer.Option(help="Where the run would be.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look at this machine before a training: what is there, what a run needs, whether the kernels compute rightly.

    Ends with 0 where nothing is bad, with 1 where something is.
    """
    import json
    from dataclasses import asdict

    from cllm_spheres_cli.progress import interruptible
    from rich.console import Console

    try:
        from cllm_spheres.doctor import needs
        from cllm_spheres.doctor.examine import examine
    except (ImportError, OSError) as error:
        print(f"bad   installation     {type(error).__name__}: {error}\n{'':23}-> Install cllm-spheres anew.")
        raise typer.Exit(1) from None

    options = {"preset": preset, "spheres": spheres, "workers": workers, "dtype": dtype}
    config, job = needs.plan(dict(options))
    out, told = Console(), Console(stderr=True)
    findings: list[Finding] = []

    def status(text: str) -> None:
        if text:
            told.print(f"... {text}", markup=False, highlight=False, soft_wrap=True)

    with interruptible("Nothing was changed."):
        for finding in examine(config, job, run, status):
            findings.append(finding)
            if not as_json:
                _show(out, finding)
    bad, notes = (sum(finding.state == state for finding in findings) for state in ("bad", "note"))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        counts = f"{len(findings)} checks: {bad} bad, {notes} to note."
        print(f"{counts} {'Training cannot work like this.' if bad else 'Training will work.'}")
    raise typer.Exit(1 if bad else 0)


def _show(console: Console, finding: Finding) -> None:
    """One finding: wrapped under its column on a terminal, else one line, and one for the advice."""
    from rich.table import Table
    from rich.text import Text

    advice = f"-> {finding.advice}" if finding.advice else ""
    if not console.is_terminal:
        print(f"{finding.state:{_STATE}}  {finding.check:{_CHECK}}  {finding.found}")
        if advice:
            print(f"{'':{_STATE + _CHECK + 4}}{advice}")
        return
    row = Table.grid(padding=(0, 2, 0, 0))
    row.add_column(width=_STATE)
    row.add_column(width=_CHECK)
    row.add_column()
    row.add_row(Text(finding.state, _COLOURS[finding.state]), Text(finding.check, "bold"), Text(finding.found))
    if advice:
        row.add_row("", "", Text(advice, _COLOURS[finding.state]))
    console.print(row)
