"""The curves of a preset on a corpus -> an SVG: validation loss, and the paired difference to cross-entropy."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from cllm_spheres_bench.crystal_compare import Curves
from cllm_spheres_bench.crystal_grid import CRYSTAL, PLAIN, RANDOM, SMOOTHING, Cell
from cllm_spheres_bench.crystal_stats import Interval, interval

COLOURS = {PLAIN: "black", CRYSTAL: "tab:red", SMOOTHING: "tab:blue", RANDOM: "tab:green"}
STYLES = ("-", "--", ":", "-.")  # of alphas, the smallest first


def need_plots() -> bool:
    """Whether there is matplotlib; say what is missing where there is none."""
    if importlib.util.find_spec("matplotlib"):
        return True
    print("No SVG will be written: matplotlib is missing. pip install 'cllm-spheres[plots]'", file=sys.stderr)
    return False


def draw(path: Path, title: str, curves: Curves, cells: list[Cell], inits: tuple[str, ...]) -> None:
    """Lines are means over the seeds, bands their 95 % intervals; a row an initialisation."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = title  # the same picture is the same file
    from matplotlib import pyplot

    alphas = sorted({cell.alpha for cell in cells if cell.alpha is not None})
    figure, axes = pyplot.subplots(
        len(inits), 2, figsize=(11, 4 * len(inits)), squeeze=False, layout="constrained", sharex=True, sharey="col"
    )
    for init, (whole, less) in zip(inits, axes, strict=True):
        own = [Cell(cell.loss, cell.alpha, init) for cell in cells]
        for cell in own:
            style = STYLES[alphas.index(cell.alpha) % len(STYLES)] if cell.alpha is not None else "-"
            look = {"color": COLOURS[cell.loss], "linestyle": style, "lw": 1.2, "label": str(cell)}
            steps, values = points(curves, cell, None)
            whole.plot(steps, [value.mean for value in values], **look)
            steps, values = points(curves, cell, cell.plain)
            less.plot(steps, [value.mean for value in values], **look)
            low, high = ([v.mean + sign * (v.half or 0) for v in values] for sign in (-1, 1))
            less.fill_between(steps, low, high, color=COLOURS[cell.loss], alpha=0.08, lw=0)
        whole.set(ylabel="validation loss (nats a token)", title=f"embeddings: {init}")
        less.set(ylabel="less cross-entropy", title="paired difference, 95 % interval")
        less.legend(fontsize=7, ncols=2)
    everything = [Cell(cell.loss, cell.alpha, init) for init in inits for cell in cells]
    for axis, paired in zip(axes[-1], (False, True), strict=True):
        axis.set_xlabel("step")
        axis.set_ylim(*limits(curves, everything, paired=paired))
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def points(curves: Curves, cell: Cell, other: Cell | None) -> tuple[list[float], list[Interval]]:
    """Steps, and the interval of the losses there, or of the differences to another cell's."""
    own = curves.of.get(cell, {})
    others = None if other is None else curves.of.get(other, {})
    seeds = sorted(own if others is None else own.keys() & others.keys())
    if not seeds:
        return [], []
    steps = [step for step, _ in own[seeds[0]]]
    return steps, [
        interval([own[seed][i][1] - (0.0 if others is None else others[seed][i][1]) for seed in seeds])
        for i in range(len(steps))
    ]


def limits(curves: Curves, cells: list[Cell], *, paired: bool) -> tuple[float, float]:
    """Of an axis: all points but those of the first third, which would flatten the rest, with their bands."""
    ends = [0.0] if paired else []
    for cell in cells:
        _, values = points(curves, cell, cell.plain if paired else None)
        for value in values[len(values) // 3 :]:
            ends += [value.mean - (value.half or 0), value.mean + (value.half or 0)]
    low, high = min(ends, default=0.0), max(ends, default=0.0)
    margin = 0.05 * (high - low) or 0.01
    return low - margin, high + margin
