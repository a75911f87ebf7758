"""`cllm-spheres model`: what a model computes, call by call, and what a training of it takes in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cllm_spheres.config import PRESETS

if TYPE_CHECKING:
    from rich.table import Table

    from cllm_spheres.model.summary import Part, Row
    from cllm_spheres.spheres.job import Job

_SPHERES = (1, 4, 12, 63)  # of the table of memory, besides the run's own
_WIDE = 1000  # columns where there is no terminal: rows are never wrapped there
_ALL_COLUMNS = 132  # of a terminal that shows the whole table; others show half of it


def model(
    name: Annotated[
        str, typer.Argument(help="A preset, or the folder of a run or of a model.", metavar="PRESET|RUN")
    ] = "small",
    dtype: Annotated[
        str | None, typer.Option(help="As for train.", metavar="auto|fp32|bf16", show_default=False)
    ] = None,
    recompute: Annotated[
        str | None, typer.Option(help="As for train.", metavar="auto|none|cheap|block", show_default=False)
    ] = None,
    spheres: Annotated[int | None, typer.Option(help="As for train.", show_default=False)] = None,
    workers: Annotated[int | None, typer.Option(help="As for train.", show_default=False)] = None,
) -> None:
    """Show what a model computes: the calls of its kernels, shapes, FLOP, memory. Nothing is compiled or run.

    A folder that is named like a preset is given as ./NAME.
    """
    from rich.console import Console

    from cllm_spheres.model.costs import flops_per_token
    from cllm_spheres.model.dtypes import describe
    from cllm_spheres.model.families import family_of
    from cllm_spheres.model.summary import parts
    from cllm_spheres.training.plan import AGAIN
    from cllm_spheres.units import compact, plural

    given = {"dtype": dtype, "recompute": recompute, "spheres": spheres, "workers": workers}
    job = _job(name, {key: value for key, value in given.items() if value is not None})
    program, shape = job.programs["train"], job.shape
    arithmetic = describe(dtype if dtype == "bf16" else job.dtype)  # that it is not to be had here is said, too
    console = Console()

    def show(table: Table) -> None:
        """Plain lines, never wrapped, where there is no terminal."""
        if console.is_terminal:
            console.print(table)
            return
        wide = Console(width=_WIDE)
        with wide.capture() as capture:
            wide.print(table)
        print("\n".join(line.rstrip() for line in capture.get().splitlines()))

    print(
        f"{name}: a {family_of(shape).title} of {job.layout.num_parameters:,} parameters;"
        f" {plural(program.sequences, 'sequence')} of {shape.block_size:,} tokens at a time, in"
        f" {arithmetic}{AGAIN[job.recompute]}."
    )
    columns = console.width if console.is_terminal else _WIDE
    show(_calls(parts(program), range(7) if columns >= _ALL_COLUMNS else (0, 2, 3, 4)))
    forward, training = flops_per_token(shape, training=False), flops_per_token(shape)
    counted = "" if job.recompute == "none" else ", without what is computed again"
    print(
        f"\n{compact(forward)} FLOP a token forward, {compact(training)} in training{counted};"
        f" {plural(len(program.calls), 'call')} in an arena of {program.arena_bytes / 1e6:,.2f} MB.\n"
    )
    show(_memory(job))


def _job(name: str, given: dict[str, Any]) -> Job:
    """The job of a preset, or of a run as its config.toml or its model has it, with what the user gave."""
    from dataclasses import asdict, replace

    from cllm_spheres.config import Config, build, merge
    from cllm_spheres.doctor.needs import job_of, plan
    from cllm_spheres.errors import InputError, nearest, shown
    from cllm_spheres.exchange.source import open_source
    from cllm_spheres.training.folder import CONFIG_TOML, read_config

    if name in PRESETS:
        return plan({"preset": name, **given})[1]
    path = Path(name)
    try:
        is_folder, has_config = path.is_dir(), (path / CONFIG_TOML).is_file()
    except OSError as error:
        raise InputError(f"Cannot read {name}: {error.strerror}.") from None
    if not is_folder:
        raise InputError(f"{shown(name)} is no folder and no preset: {nearest(name, PRESETS)}")
    if has_config:
        config = build(read_config(path)[0].model_dump() | given)
        return job_of(config, {"batch_size", "spheres", *given})
    shape = open_source(path).shape
    sizes = {key: value for key, value in asdict(shape).items() if key in Config.model_fields}
    return replace(job_of(build(merge(given)[0].model_dump() | sizes), set(given)), shape=shape)


def _calls(found: list[Part], columns: Sequence[int]) -> Table:
    """Some columns of: op, its name in a profile, sizes, parameters, FLOP, bytes, place in the arena."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    names = ("call", "in a profile", "sizes", "parameters", "FLOP/token", "bytes/token", "in the arena, kB")
    for number in columns:
        table.add_column(names[number], justify="right" if number > 2 else "left", no_wrap=True)
    for part in found:
        title = "forward" if part.forward else "backward"
        if part.blocks[0] is not None:
            title += f", block {part.blocks[0]}" + (f" to {part.blocks[-1]}" if len(part.blocks) > 1 else "")
            title += f" ({len(part.blocks)} x)" if len(part.blocks) > 1 else ""
        table.add_row(title, style="bold")
        for row in part.rows:
            cells = _cells(row)
            table.add_row(*(cells[number] for number in columns))
    return table


def _cells(row: Row) -> list[str]:
    largest = max(row.new, key=lambda value: value.size_bytes, default=None)
    first = row.places[largest] if largest else 0
    return [
        f"  {row.call.op}", row.label, row.shapes, f"{row.parameters:,}" if row.parameters else "",
        f"{row.flops:,}" if row.flops else "", f"{row.bytes_per_token:,.0f}" if row.new else "",
        f"{first / 1e3:,.1f} to {(first + largest.size_bytes) / 1e3:,.1f}" if largest else "",
    ]  # fmt: skip


def _memory(job: Job) -> Table:
    """What a training takes, in MB: by spheres, and by what the backward pass computes again."""
    from dataclasses import replace

    from rich.table import Table

    from cllm_spheres.model.program import RECOMPUTE
    from cllm_spheres.training.plan import memory_bytes, memory_parts

    def megabytes(size_bytes: float) -> str:
        return f"{size_bytes / 1e6:,.1f}"

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("memory of a training, MB", no_wrap=True)
    counts = sorted({*_SPHERES, job.spheres})
    for count in counts:
        table.add_column(f"{count} sphere{'s' * (count > 1)}", justify="right", no_wrap=True)
    jobs = [
        replace(job, spheres=n, workers=min(job.workers, n), batch_size=max(n, job.batch_size)) for n in counts
    ]  # fmt: skip
    table.add_row("workers", *(str(one.workers) for one in jobs))
    parts = [memory_parts(one) for one in jobs]
    for part in parts[0]:
        if any(found[part] for found in parts):
            table.add_row(part, *(megabytes(found[part]) for found in parts))
    for mode in RECOMPUTE:
        sums = [memory_bytes(replace(one, recompute=mode)) for one in jobs]
        table.add_row(f"all with --recompute {mode}", *map(megabytes, sums), style="bold")
    return table
