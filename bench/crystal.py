"""`cllm-spheres bench crystal`: losses, initialisations and texts -> what each is worth, with intervals, and its cost.

The grid: a small model on every corpus with cross-entropy, the crystalline loss, ordinary label smoothing and soft
targets over random neighbours, each at every alpha and with both initialisations. The final: a larger model on the
first corpus with the alpha at which the crystalline loss did best, and random neighbours. The cost: steps in turn.
Every run is an ordinary training; its result is a line of crystal.jsonl, and is not trained again.
"""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cllm_spheres_bench import crystal_cost as cost
from cllm_spheres_bench import crystal_grid as grid
from cllm_spheres_bench import crystal_plot as plot
from cllm_spheres_bench import crystal_report as report
from cllm_spheres_bench.crystal_compare import Curves, best_alpha
from cllm_spheres_bench.crystal_grid import Cell, Corpus, Records, Task
from cllm_spheres_bench.crystal_mass import shares
from cllm_spheres_bench.machine import facts, results_folder

from cllm_spheres.config import merge, preset_values
from cllm_spheres.errors import InputError, Interrupted
from cllm_spheres.model.dtypes import choose
from cllm_spheres.units import duration

STAGES = ("grid", "final", "cost")
EMBEDDED = "embedded"
FINAL_ALPHA = 0.1  # while the grid cannot tell which is best


@dataclass(frozen=True)
class Options:
    """What is trained, and how often."""

    texts: tuple[Path, ...] = ()
    embedded: bool = True
    only: tuple[str, ...] = STAGES
    preset: str = "small"
    final_preset: str = "medium"
    cost_presets: tuple[str, ...] = ("small", "medium")
    alphas: tuple[float, ...] = grid.ALPHAS
    inits: tuple[str, ...] = grid.INITS
    seeds: int = 5
    final_seeds: int = 3
    steps: int = 1000
    eval_tokens: int = 100_000
    dtype: str = "auto"
    rounds: int = 5
    seconds: float = 6.0
    workers: int | None = None
    work: Path = Path("runs/bench-crystal")
    out: Path | None = None
    command: str = "cllm-spheres bench crystal"


def alphas_of(words: str) -> tuple[float, ...]:
    """Weights between commas -> sorted and once each; InputError where one is no number above 0, up to 1."""
    try:
        found = sorted({float(word) for word in words.split(",")})
    except ValueError:
        raise InputError(f"--alphas {words!r} is not a list of numbers such as 0.05,0.1.") from None
    if not all(0 < alpha <= 1 for alpha in found):
        raise InputError(f"--alphas {words}: each is above 0 and at most 1.")
    return tuple(found)


def without_folders(words: list[str]) -> str:
    """A command line with the names of files alone: a result does not tell where they lay."""
    return shlex.join(re.sub("[^=]*/", "", word) if "/" in word else word for word in words)


def corpora_of(options: Options) -> list[Corpus]:
    """The embedded corpus and the texts, by names that differ; InputError where there is none."""
    found = [Corpus(EMBEDDED)] if options.embedded else []
    found += [Corpus(path.stem, path) for path in options.texts]
    names = [corpus.name for corpus in found]
    if len(set(names)) < len(names):
        raise InputError(f"Two texts have one name: {', '.join(names)}. Rename one.")
    if not found:
        raise InputError("Without the embedded corpus there must be a --text.")
    for corpus in found:
        if corpus.path and not corpus.path.exists():
            raise InputError(f"--text {corpus.path}: there is no such file or folder.")
    return found


def run(options: Options) -> int:
    """Train what is not done yet, measure, print, write crystal.jsonl, .md and pictures; the exit code."""
    folder = results_folder(options.out)
    for preset in (options.preset, options.final_preset, *options.cost_presets):
        preset_values(preset)
    corpora, records = corpora_of(options), Records(folder / "crystal.jsonl")
    draws = plot.need_plots()
    try:
        if "grid" in options.only:
            train_all(grid_tasks(options, corpora), records, options)
        if "final" in options.only:
            train_all(final_tasks(options, corpora, records), records, options)
        if "cost" in options.only:
            measure_costs(options, corpora[0], records)
    except (KeyboardInterrupt, Interrupted) as error:
        number = error.exit_code - 128 if isinstance(error, Interrupted) else int(signal.SIGINT)
        raise Interrupted(
            f"Stopped by {signal.Signals(number).name}. What is done stands in {records.path}; the same command goes"
            " on there.", number,
        ) from None  # fmt: skip
    parts = parts_of(options, corpora, records, folder if draws else None)
    text = report.markdown_of(facts(options.command), parts, list(records.costs().values()))
    print(text)
    (folder / "crystal.md").write_text(text)
    print(f"Written: {folder / 'crystal.md'}, {records.path}")
    return 0


def grid_tasks(options: Options, corpora: list[Corpus]) -> list[Task]:
    """Every loss at every alpha with each initialisation on every corpus."""
    cells = [Cell(cell.loss, cell.alpha, init) for init in options.inits for cell in grid.losses(options.alphas)]
    return grid.tasks(
        corpora, options.preset, cells, options.seeds, options.steps, options.eval_tokens, options.dtype
    )  # fmt: skip


def final_tasks(options: Options, corpora: list[Corpus], records: Records) -> list[Task]:
    """Cross-entropy, the crystal at the grid's best alpha and random neighbours, on the first corpus."""
    done = records.runs()
    found = [done[task.key] for task in grid_tasks(options, corpora[:1]) if task.key in done]
    alpha = best_alpha(Curves(found), grid.CRYSTAL, options.alphas)
    if alpha is None:
        alpha = FINAL_ALPHA if FINAL_ALPHA in options.alphas else options.alphas[0]
    cells = [Cell(), Cell(grid.CRYSTAL, alpha), Cell(grid.RANDOM, alpha)]
    return grid.tasks(
        corpora[:1], options.final_preset, cells, options.final_seeds, options.steps,
        options.eval_tokens, options.dtype,
    )  # fmt: skip


def train_all(tasks: list[Task], records: Records, options: Options) -> None:
    """Those that have no record yet, in order; a line each on standard error, with the time that the rest will take."""
    waiting = [task for task in tasks if task.key not in records.runs()]
    _say(f"{len(tasks)} runs, {len(tasks) - len(waiting)} are done.")
    began, made = time.monotonic(), 0
    for number, task in enumerate(waiting):
        folder = options.work.absolute() / task.key
        with grid.claimed(folder) as ours:
            if not ours or task.key in records.runs():
                _say(f"{task}: another process {'did' if ours else 'does'} it.")
                continue
            started = time.monotonic()
            record = grid.train(task, folder, options.workers)
            records.append(record)
        made += 1
        now = time.monotonic()
        left = (now - began) / made * (len(waiting) - number - 1)
        _say(
            f"[{len(tasks) - len(waiting) + number + 1}/{len(tasks)}] {task}: {record['curve'][-1][1]:.4f}"
            f" in {now - started:.0f} s{f', about {duration(left)} left' if left else ''}"
        )


def measure_costs(options: Options, corpus: Corpus, records: Records) -> None:
    """Of every preset in float32 and bfloat16; each is written when it is measured, and measured anew each time."""
    alpha = FINAL_ALPHA if FINAL_ALPHA in options.alphas else options.alphas[0]
    folder = options.work.absolute() / "cost"
    try:
        for preset in options.cost_presets:
            for dtype in cost.COST_DTYPES:
                found = cost.measure(
                    corpus, preset, dtype, grid.losses((alpha,)), seconds=options.seconds, rounds=options.rounds,
                    workers=options.workers, folder=folder, say=_say,
                )  # fmt: skip
                if found:
                    records.append(found)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def parts_of(
    options: Options, corpora: list[Corpus], records: Records, folder: Path | None
) -> list[report.Part]:  # fmt: skip
    """What is done of the grid and of the final; pictures of it go into a folder, if there is one."""
    done = records.runs()
    return [
        _part(tasks, done, inits, folder)
        for tasks, inits in (
            (grid_tasks(options, corpora), options.inits),
            (final_tasks(options, corpora, records), (grid.USUAL,)),
        )
    ]


def _part(
    tasks: list[Task], done: dict[str, dict[str, Any]], inits: tuple[str, ...], folder: Path | None
) -> report.Part:  # fmt: skip
    first = tasks[0]
    cells = list(dict.fromkeys(replace(task.cell, init=grid.USUAL) for task in tasks))
    corpora, tokens, pictures, masses = {}, {}, {}, {}
    missing = 0
    for name in dict.fromkeys(task.corpus.name for task in tasks):
        own = [task.key for task in tasks if task.corpus.name == name]
        found = [done[key] for key in own if key in done]
        missing += len(own) - len(found)
        corpora[name] = curves = Curves(found)
        if found:
            tokens[name] = found[0]["tokens"]
            text = next(task.corpus for task in tasks if task.corpus.name == name)
            masses[name] = shares(text.prepared(first.preset), first.preset)
        if found and folder:
            pictures[name] = f"crystal-{first.preset}-{name}.svg"
            seeds = len({record["seed"] for record in found})
            title = f"{first.preset} on {name}, {first.steps:,} steps, seeds: {seeds}"
            plot.draw(folder / pictures[name], title, curves, cells, inits)
    dtype = choose(first.dtype, merge({"preset": first.preset})[0].width)
    return report.Part(first.preset, first.steps, dtype, cells, inits, corpora, tokens, missing, pictures, masses)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
