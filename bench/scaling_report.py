"""Measured points and the model's parts -> Markdown, a chart in the terminal, and a chart as SVG."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

from cllm_spheres_bench import scaling_model as model
from cllm_spheres_bench.machine import markdown
from cllm_spheres_bench.scaling_run import PHASES, Point

from cllm_spheres.units import size

MODELS = ((True, "bandwidth grows with the cores"), (False, "bandwidth stays that of this machine"))


def need_plots() -> None:
    """Say what is missing for the chart as a file; everything else works without."""
    if importlib.util.find_spec("matplotlib") is None:
        print("No SVG will be written: matplotlib is missing. pip install 'cllm-spheres[plots]'", file=sys.stderr)


def predicted(point: Point, parts: model.Parts, *, grows: bool) -> float:
    """Tokens/s of the model for a point's workers, spheres and batch."""
    step_s = model.step_s(parts, point.workers, point.spheres, grows=grows)
    return point.tokens_per_s * point.step_s / step_s


def markdown_of(result: dict[str, Any], points: dict[str, list[Point]], parts: model.Parts) -> str:
    """The whole result as text."""
    cores, parameters = result["cores"], result["parameters"]
    lines = [
        f"# Scaling: {result['preset']}, {result['dtype']}", "",
        f"{result['machine']}, {cores} cores, {result['system']}, commit {result['commit']}, {result['date']};"
        f" `{result['command']}`. {parameters:,} parameters.", "",
    ]  # fmt: skip
    crowded = [p.workers for p in points["strong"] if p.workers > cores]
    if crowded:
        lines += [
            f"**{', '.join(map(str, crowded))} workers are more than the {cores} cores: they take turns.** Their rates"
            " show what the spheres cost, not what more cores would bring; efficiency counts cores, not workers.", "",
        ]  # fmt: skip
    lines += [f"Left out: {reason}." for reason in result["left_out"]]
    for kind, found in points.items():
        if found:
            lines += [f"## {kind.capitalize()} scaling", "", _table(found, cores), ""]
        if found and kind == "weak":
            lines += ["Workers share the update and the packing of the same weights: this can exceed 100 %.", ""]
    lines += ["## Memory bandwidth", "", _bandwidths(result, points["strong"], parts.has_squares), ""]
    lines += ["## A core for each worker: the model", "", _models(points, parts), ""]
    a, b = (x * 1e6 for x in parts.barrier_s)
    lines.append(
        "Not measured: `step(W) = ceil(S/W) shard + gather + update + pack + barriers` with"
        f" shard {parts.shard_s * 1e3:.2f} ms, gather {parts.gather_alone_s * 1e3:.2f} ms and update"
        f" {parts.update_alone_s * 1e3:.2f} ms for one worker, barrier {a:.1f} + {b:.2f} W microseconds (too long"
        " where measured with more workers than cores). docs/spheres.md explains it."
    )
    return "\n".join(lines) + "\n"


def _table(found: list[Point], cores: int) -> str:
    packs = any(p.phases_s["pack"] for p in found)
    phases = [name for name in PHASES if packs or name != "pack"]
    head = [
        "workers", "spheres", "batch", "tokens/s", "efficiency", "step, ms", *(f"{name}, ms" for name in phases),
        "barrier, µs", "memory (PSS)",
    ]  # fmt: skip
    shares = model.efficiency([p.workers for p in found], [p.tokens_per_s for p in found], cores)
    rows = [
        [
            f"{p.workers}{' *' if p.workers > cores else ''}", str(p.spheres), str(p.batch_size),
            f"{p.tokens_per_s:,.0f}", f"{share:.1%}", f"{p.step_s * 1e3:,.1f}",
            *(f"{p.phases_s[name] * 1e3:,.2f}" for name in phases), f"{p.barrier_s * 1e6:,.1f}", size(p.pss_bytes),
        ]
        for p, share in zip(found, shares, strict=True)
    ]  # fmt: skip
    note = "\n\\* more workers than cores. Phases: mean over the workers; of * they hold the turns of others, too."
    return markdown(head, rows) + (note if any(p.workers > cores for p in found) else "")


def _bandwidths(result: dict[str, Any], strong: list[Point], has_squares: bool) -> str:
    """Gather and update of the points that have a core a worker, beside reading and a triad in the same run."""
    parameters = result["parameters"]
    rows = []
    for cores, plain in result["bandwidth_gb_per_s"].items():
        point = next((p for p in strong if p.workers == int(cores)), None)
        cells = ["", ""]
        if point:
            gathered = model.gather_bytes(parameters, point.spheres) / point.phases_s["gather"]
            updated = model.update_bytes(parameters, point.spheres, has_squares) / point.phases_s["update"]
            cells = [f"{gathered * 1e-9:.1f}", f"{updated * 1e-9:.1f}"]
        rows.append([cores, f"{plain['read']:.1f}", f"{plain['triad']:.1f}", *cells])
    return markdown(["cores", "reading, GB/s", "triad, GB/s", "gather, GB/s", "update, GB/s"], rows)


def _models(points: dict[str, list[Point]], parts: model.Parts) -> str:
    rows = [
        [f"{kind}, {p.workers}", f"{p.tokens_per_s:,.0f}"]
        + [f"{predicted(p, parts, grows=grows):,.0f}" for grows, _ in MODELS]
        for kind, found in points.items() for p in found
    ]  # fmt: skip
    return markdown(["scaling, workers", "measured, tokens/s", *(f"model: {name}" for _, name in MODELS)], rows)


def show(text: str, points: dict[str, list[Point]], parts: model.Parts, cores: int) -> None:
    """Print the result, and on a terminal or not a chart of strong scaling in characters."""
    from rich.console import Console

    from cllm_spheres.watch.paint import ACCENT, NOTE, WARM, Frame, seg
    from cllm_spheres.watch.plot import Curve, plot

    print(text)
    strong = points["strong"]
    if len(strong) < 2:
        return
    measured = [(p.workers, p.tokens_per_s) for p in strong]
    models = [[(p.workers, predicted(p, parts, grows=grows)) for p in strong] for grows, _ in MODELS]
    top = max(y for curve in (measured, *models) for _, y in curve)
    width = min(100, shutil.get_terminal_size((80, 24)).columns)
    curves = [
        Curve(models[0], ACCENT), Curve(models[1], NOTE), Curve(measured, WARM, mark="◆"),
    ]  # fmt: skip
    lines = plot(curves, [], width, 18, (measured[0][0], measured[-1][0]), (0.0, 1.05 * top))
    title = [seg("Strong scaling, tokens/s over workers: "), seg("◆ measured", WARM)]
    legend = [
        seg("⠒ model, bandwidth grows", ACCENT), seg("   "), seg("⠒ model, bandwidth stays", NOTE),
    ]  # fmt: skip
    Console().print(Frame([title, legend, *lines]))
    print()


def chart(path: Path, points: dict[str, list[Point]], parts: model.Parts, result: dict[str, Any]) -> Path | None:
    """The picture, as SVG; None without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    found = {kind: p for kind, p in points.items() if p}
    figure, axes = pyplot.subplots(1, len(found), figsize=(6 * len(found), 4.5), squeeze=False)
    for axis, (kind, own) in zip(axes[0], found.items(), strict=True):
        workers = [p.workers for p in own]
        for (grows, name), style in zip(MODELS, ("--", ":"), strict=True):
            rates = [predicted(p, parts, grows=grows) for p in own]
            axis.plot(workers, rates, style, label=f"model: a core each, {name}")
        axis.plot(workers, [p.tokens_per_s for p in own], "o-", label=f"measured on {result['cores']} cores")
        if workers[-1] > result["cores"]:
            axis.axvspan(result["cores"], workers[-1], alpha=0.08, label="more workers than cores")
        axis.set(title=f"{kind} scaling", xlabel="workers", ylabel="tokens/s", xscale="log", yscale="log")
        axis.set_xticks(workers, [str(w) for w in workers], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(
        f"{result['preset']}, {result['dtype']}, {result['machine']}, commit {result['commit']}", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path
