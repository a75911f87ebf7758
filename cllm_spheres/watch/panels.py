"""A `RunView` -> the parts of the dashboard: head, progress, curves, numbers, phases, messages."""

from __future__ import annotations

from cllm_spheres.units import compact, duration, time_of_day
from cllm_spheres.watch.paint import (
    ACCENT,
    BAD,
    DIM,
    FAINT,
    FRAME,
    INK,
    NOTE,
    PHASE_STYLES,
    STATE_STYLES,
    STRONG,
    TITLE,
    VIOLET,
    WARM,
    Line,
    box,
    clean,
    length,
    seg,
    spread,
)
from cllm_spheres.watch.plot import Curve, Reference, plot
from cllm_spheres.watch.records import number
from cllm_spheres.watch.view import PHASES, RunView

# Without colours the phases of the bar are told apart by their characters.
_PHASE_MARKS = {"pack": "▚", "compute": "█", "waiting": "░", "gather": "▓", "update": "▒", "other": "·"}


def _count(view: RunView, key: str, word: str) -> str:
    value = number(view.facts, key)
    return "" if value is None else f"{int(value):,} {word}{'' if value == 1 else 's'}"


def head(view: RunView, now: float, width: int) -> Line:
    """◉ cllm-spheres  amber-otter  ● running              63 spheres · 2 workers · 824k parameters"""
    state = view.state(now)
    style = STATE_STYLES.get(state, BAD)
    left = [seg(" ◉ ", ACCENT), seg("cllm-spheres", STRONG), seg("  ")]
    left += [seg(clean(view.name), TITLE), seg("  "), seg("● ", style), seg(state, style)]
    parameters = number(view.facts, "num_parameters")
    facts = [_count(view, "spheres", "sphere"), _count(view, "workers", "worker")]
    facts.append(f"{compact(parameters)} parameters" if parameters else "")
    while facts:
        right = [seg(" · ".join(f for f in facts if f) + " ", DIM)]
        if length(left) + length(right) + 1 < width:
            return spread(left, right, width)
        facts.pop()
    return spread(left, [], width)


def progress(view: RunView, now: float, width: int) -> Line:
    """step 1,234 / 2,000 ━━━━━━━━━━━━━━───────  61.7 %  1m02s  eta 39s"""
    step, target = view.current_step, view.target
    left = [seg(" step ", DIM), seg(f"{step:,}", STRONG), seg(f" / {target:,} " if target else " ", DIM)]
    share = min(1.0, step / target) if target else 0.0
    right = [seg(f" {100 * share:5.1f} %", INK)] if target else []
    eta = view.eta_s(now)
    if eta is not None and not view.finished:
        right += [seg("  eta ", DIM), seg(f"{duration(eta):<6}", STRONG)]
    elapsed = view.elapsed_s(now)
    if elapsed is not None:
        right += [seg("  after " if view.finished else "  elapsed ", DIM), seg(duration(elapsed) + " ", INK)]
    room = width - length(left) - length(right) - 1
    if not target or room < 5:
        return spread(left, right, width)
    done = round(room * share)
    return [*left, seg("━" * done, ACCENT), seg("─" * (room - done), FRAME), seg(" "), *right]


def curves(view: RunView, width: int, height: int, notice: str) -> list[Line]:
    """The framed plot of training and validation loss over the steps."""
    title = [seg("loss ", TITLE), seg("⠒ training ", ACCENT), seg("◆ validation", WARM)]
    references = [
        Reference(value, style, name)
        for name, style in (("bigram", NOTE), ("unigram", VIOLET))
        if (value := number(view.eval, f"{name}_loss")) is not None
    ]
    inner_width, inner_height = width - 4, height - 2
    raw, smooth, val = view.loss.points(), view.loss.smoothed(), view.val.points()
    if not (raw or val) or inner_height < 3 or inner_width < 20:
        text = "" if notice or raw or val else "waiting for the first step"
        blank: list[Line] = [[]] * max(0, (inner_height - 1) // 2)
        return box(title, [*blank, [seg(clean(text).center(inner_width), NOTE)]], width, height)
    x = (min(p[0][0] for p in (raw, val) if p), max(p[-1][0] for p in (raw, val) if p))
    if x[0] == x[1]:
        x = (x[0], x[0] + 1)
    # Most of the height for what is going on now: the first fall may leave through the top.
    tops = sorted(v for _, v in smooth)[: max(1, round(0.985 * len(smooth)))]
    known = [v for _, v in val[len(val) // 20 :]] + tops
    bottoms = [v for _, v in val] + ([sorted(v for _, v in raw)[len(raw) // 100]] if raw else [])
    low, high = min(bottoms), max(known)
    for reference in references:
        if reference.value < high + 0.5 * (high - low):
            low, high = min(low, reference.value), max(high, reference.value)
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    mark = "◆" if len(val) <= inner_width // 4 else None
    over = [Curve(smooth, ACCENT), Curve(val, WARM, mark=mark)]
    drawn = [Curve(raw, FAINT, dots=True), *(reversed(over) if mark else over)]
    lines = plot(drawn, references, inner_width, inner_height, x, (low - pad, high + pad))
    foot = None
    if view.turned_up is not None:
        best = view.best
        foot = [seg(f"validation has turned up{f', best at step {best[0]:,}' if best else ''}", NOTE)]
    return box(title, lines, width, height, foot)


def phases(view: RunView, width: int, colour: bool) -> list[Line]:
    """Two lines: a stacked bar of where the time goes, and its legend with numbers."""
    shares = view.shares()
    room = width - 2
    cells = {}
    left, rest = room, 1.0
    for name in PHASES:  # each takes its part of what is left, so that the whole bar is filled
        share = shares.get(name, 0.0)
        cells[name] = round(left * min(1.0, share / rest)) if rest > 1e-9 else 0
        left, rest = left - cells[name], rest - share
    bar = [seg(("█" if colour else _PHASE_MARKS[name]) * cells[name], PHASE_STYLES[name]) for name in PHASES]
    if not shares:
        bar = [seg("·" * room, FRAME)]
    legend: Line = []
    for name in PHASES:
        if name == "pack" and name not in shares:
            continue
        mark = "■" if colour else _PHASE_MARKS[name]
        value = f"{100 * shares[name]:.0f} %" if name in shares else "–"
        word = name if width >= 72 else name[:4]
        legend += [seg(f"{mark} ", PHASE_STYLES[name]), seg(f"{word} ", DIM), seg(value, INK), seg("  ")]
    if length(legend) > width:
        legend = [seg(" ") if segment.text == "  " else segment for segment in legend]
    titles = (" time of a step  ", " time  ", " ")
    title = next((title for title in titles if len(title) + length(legend) <= width + 2), " ")
    return [spread([seg(" "), *bar], [], width), spread([seg(title, DIM), *legend], [], width)]


def messages(view: RunView, width: int, num: int) -> list[Line]:
    """The last `num` events, a line each."""
    styles = {
        "failed": BAD,
        "stopping": NOTE,
        "turned_up": NOTE,
        "skip": NOTE,
        "fingerprint": NOTE,
        "best": WARM,
    }
    lines = []
    for time, name, message in list(view.messages)[-num:]:
        line = [seg(f" {time_of_day(time)} ", DIM), seg(clean(message), styles.get(name, INK))]
        lines.append(spread(line, [], width))
    return lines
