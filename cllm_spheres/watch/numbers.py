"""A `RunView` -> the framed numbers of the dashboard, with small curves where there is room."""

from __future__ import annotations

from rich.style import Style

from cllm_spheres.units import compact, fixed, rate, size
from cllm_spheres.watch.paint import ACCENT, DIM, FAINT, INK, STRONG, TITLE, WARM, Line, box, clean, seg, spread
from cllm_spheres.watch.plot import Curve, plot, spark
from cllm_spheres.watch.records import cross_entropy_of, number
from cllm_spheres.watch.series import Point, Series
from cllm_spheres.watch.view import RunView

NAME_WIDTH = 12
MIN_PLOT = 8  # lines of a plot under the numbers, with its frame
_PLOTS = (("gradient norm", "norm"), ("tokens/s", "speed"))


class _Rows:
    """Lines of a name, a value, something beside it where there is room, and a small curve."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.wide = width >= 34
        self.lines: list[Line] = []

    def add(self, name: str, value: str, beside: str = "", series: Series | None = None, style: Style = STRONG) -> None:
        room = self.width - NAME_WIDTH - len(value) - len(beside)
        line = [seg(name.ljust(NAME_WIDTH), DIM), seg(value, style)]
        line.append(seg(" " * min(2, room) + beside if beside and room > 0 else "", DIM))
        curve = spark(series.points(), 12) if series is not None and self.width >= 42 else ""
        self.lines.append(spread(line, [seg(curve, FAINT)], self.width))

    def gap(self) -> None:
        self.lines.append([])


def panel(view: RunView, width: int, height: int) -> list[Line]:
    """The numbers in a frame, and where the height allows, plots under it: width x height together."""
    room = height - 2
    rows = _Rows(width - 4)
    gaps = room >= 12
    _losses(view, rows)
    if gaps:
        rows.gap()
    _pace(view, rows)
    if gaps:
        rows.gap()
    _machine(view, rows)
    if rows.wide and room >= len(rows.lines) + 4:
        rows.gap()
        _setting(view, rows)
    free = height - len(rows.lines) - 2
    num_plots = min(2, free // MIN_PLOT) if rows.wide else 0
    heights = [free // num_plots] * num_plots if num_plots else []
    plots: list[Line] = []
    for (title, series), plot_height in zip(_PLOTS, heights, strict=False):
        plots += _plot(title, getattr(view, series).points(), width, plot_height)
    return [*box([seg("now", TITLE)], rows.lines, width, height - len(plots)), *plots]


def _plot(title: str, points: list[Point], width: int, height: int) -> list[Line]:
    if len(points) < 2:
        return box([seg(title, TITLE)], [], width, height)
    values = sorted(v for _, v in points)
    low, high = values[0], values[round(0.995 * (len(values) - 1))]
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    x = (points[0][0], points[-1][0])
    lines = plot([Curve(points, ACCENT)], [], width - 4, height - 2, x, (low - pad, high + pad))
    return box([seg(title, TITLE)], lines, width, height)


def _losses(view: RunView, rows: _Rows) -> None:
    evaluation, best = view.eval, view.best
    recent = view.loss.recent()
    beside = f"mean {fixed(recent)}" if recent is not None else ""
    loss, plain = number(view.step, "loss"), cross_entropy_of(view.step)
    if plain != loss:  # soft targets: what is differentiated is more than the cross-entropy
        beside = f"loss {fixed(loss)}"
    rows.add("training", fixed(plain), beside, view.loss, ACCENT)
    at = number(evaluation, "step")
    when = f"at {at:,.0f}" if at is not None else ""
    rows.add("validation", fixed(number(evaluation, "val_loss")), when, view.val, WARM)
    rows.add("best", fixed(best[1] if best else None), f"at {best[0]:,}" if best else "")
    perplexity = number(evaluation, "perplexity")
    shown = "" if perplexity is None else f"{perplexity:.1f}" if perplexity < 1000 else compact(perplexity)
    bits = number(evaluation, "bits_per_byte")
    if bits is None and shown:
        rows.add("perplexity", shown)
    else:
        rows.add("bits/byte", fixed(bits, 3), f"perplexity {shown}" if shown else "")
    if rows.wide:  # the plot names them too
        unigram, bigram = (fixed(number(evaluation, f"{name}_loss"), 3) for name in ("unigram", "bigram"))
        rows.add("unigram", unigram, f"bigram {bigram}", style=INK)


def _pace(view: RunView, rows: _Rows) -> None:
    step = view.step
    rows.add("learn rate", rate(number(step, "lr")), "", view.lr)
    before, after = number(step, "grad_norm"), number(step, "clipped_norm")
    clipped = before is not None and after is not None and after < before * 0.9995
    beside = f"clipped{f' {fixed(after, 3)}' if rows.wide else ''}" if clipped else ""
    rows.add("gradient", fixed(before, 3), beside, view.norm)
    mean = f"mean {compact(view.mean_tokens_per_s)}"
    rows.add("tokens/s", compact(view.tokens_per_s), mean, view.speed)


def _machine(view: RunView, rows: _Rows) -> None:
    spheres, cores = view.spheres, number(view.facts, "cores")
    cpu = spheres.cpu_percent if spheres else None
    memory = size(spheres.memory_bytes if spheres else None)
    shown = "–" if cpu is None else f"{cpu:.0f} %"
    rows.add("cpu", shown, f"of {cores:.0f} cores" if cores and cpu is not None else "")
    rows.add("memory", memory)


def _setting(view: RunView, rows: _Rows) -> None:
    facts = {key: clean(str(value)) for key, value in view.facts.items()}
    if {"layers", "width", "heads"} <= facts.keys():
        rows.add("model", f"{facts['layers']} layers", f"width {facts['width']}, {facts['heads']} heads", style=INK)
    if {"batch_size", "block_size"} <= facts.keys():
        rows.add("batch", f"{facts['batch_size']} × {facts['block_size']}", "tokens", style=INK)
    if facts.get("loss", "cross-entropy") != "cross-entropy":
        rows.add("loss", facts["loss"], f"alpha {facts.get('alpha', '')}", style=INK)
    if "optimizer" in facts:
        rows.add("optimizer", facts["optimizer"], facts.get("schedule", ""), style=INK)
