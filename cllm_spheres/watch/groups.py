"""The latest "spheres" record -> the spheres in their 12 groups: a row a sphere where there is room, else a
strip a group.

Group g is level-1 sphere g with its children on level 2.
"""

from __future__ import annotations

from functools import lru_cache

from rich.segment import Segment

from cllm_spheres.spheres import topology
from cllm_spheres.units import compact
from cllm_spheres.watch.paint import (
    ACCENT,
    DIM,
    FRAME,
    GOOD,
    HEAT,
    HEIGHTS,
    INK,
    NOTE,
    STRONG,
    TITLE,
    VIOLET,
    WARM,
    Line,
    box,
    fit,
    heat,
    seg,
)
from cllm_spheres.watch.view import RunView

NUM_GROUPS = topology.KISSING
CARD_WIDTH = 36  # the least for a row a sphere
STRIP_WIDTH = 24  # a strip a group, without its characters for spheres
GAP = 2

# A worker's state (spheres/memory.py) -> its short word, its style.
_STATES = {
    "starting": ("start", NOTE),
    "idle": ("idle", DIM),
    "packing": ("pack", NOTE),
    "computing": ("compute", GOOD),
    "waiting": ("waiting", WARM),
    "gathering": ("gather", ACCENT),
    "updating": ("update", VIOLET),
    "evaluating": ("eval", ACCENT),
    "ended": ("ended", DIM),
}


@lru_cache(maxsize=8)
def groups(num_spheres: int) -> tuple[tuple[int, ...], ...]:
    """The spheres of each group, the level-1 sphere first."""
    first = range(min(NUM_GROUPS, num_spheres))
    return tuple((sphere, *topology.children(sphere, num_spheres)) for sphere in first)


def panel(view: RunView, width: int, most: int) -> list[Line]:
    """The framed spheres in at most `most` lines, the richest form that fits; nothing without spheres."""
    num = view.num_spheres
    if not num or most < 3:
        return []
    inner = width - 4
    members = groups(num)
    rows, form = _cards(view, members, inner), "length"
    if len(rows) > most - 2:
        rows, form = _strips(view, members, inner), "height"
    rows = rows[: most - 2]
    what = "tokens/s, time waiting, state" if form == "length" else "a bar a sphere, tokens/s, time waiting, state"
    counts = f"{num} in {len(members)} group{'s' * (len(members) > 1)}"
    named = f"{counts}: {what}"
    title = [seg("spheres ", TITLE), seg(named if len(named) + 16 <= width else counts, DIM)]
    return box(title, rows, width, len(rows) + 2, _legend(inner, form))


def _legend(inner: int, form: str) -> Line:
    line = [seg("time waiting 0 % ", DIM), *(seg("■", style) for style in HEAT), seg(" 100 %", DIM)]
    return [seg(f"{form}: tokens/s   colour: ", DIM), *line] if inner >= 100 else line


def _state_segment(state: str, width: int) -> Segment:
    word, style = _STATES.get(state, (state or "–", INK))
    return seg(word[:width].ljust(width), style)


def _share(value: float | None) -> str:
    return "–".rjust(5) if value is None else f"{100 * value:3.0f} %"


def _columns(inner: int, least: int, num: int) -> tuple[int, int]:
    """How many columns, and how wide each."""
    most = max(1, (inner + GAP) // (least + GAP))
    num_rows = -(-num // min(most, num))
    columns = -(-num // num_rows)
    return columns, (inner - GAP * (columns - 1)) // columns


def _cards(view: RunView, members: tuple[tuple[int, ...], ...], inner: int) -> list[Line]:
    """A group below another and beside others: its level-1 sphere and the branches to its children."""
    columns, width = _columns(inner, CARD_WIDTH, len(members))
    fastest = max((v for v in view.spheres.throughput if v is not None), default=0.0) if view.spheres else 0.0
    lines: list[Line] = []
    for start in range(0, len(members), columns):
        cards = []
        for group in members[start : start + columns]:
            signs = ["◉", *["├"] * (len(group) - 2), *["└"] * (len(group) > 1)]
            cards.append([_row(view, k, f" {sign} ", width, fastest) for sign, k in zip(signs, group, strict=True)])
        height = max(map(len, cards))
        if start and height > 1:
            lines.append([])
        for i in range(height):
            line: Line = []
            for card in cards:
                line += [*(card[i] if i < len(card) else fit([], width)), seg(" " * GAP)]
            lines.append(line[:-1])
    return lines


def _row(view: RunView, sphere: int, sign: str, width: int, fastest: float) -> Line:
    """◉ 0 ━━━━━━━━━━╸────  402/s  12 % compute"""
    head = [seg(sign, ACCENT if "◉" in sign else FRAME), seg(f"{sphere:<4}", STRONG if "◉" in sign else INK)]
    spheres = view.spheres
    room = width - 7 - 8 - 6 - 9
    if spheres is None or sphere >= len(spheres):
        return fit([*head, seg("─" * room, FRAME)], width)
    speed, waiting = spheres.throughput[sphere], spheres.waiting[sphere]
    halves = round(2 * room * (speed or 0.0) / fastest) if fastest > 0 else 0
    bar = "━" * (halves // 2) + "╸" * (halves % 2)
    unit = "/s" if speed is not None else "  "
    tail = [seg(f" {compact(speed):>5}{unit}", INK), seg(f" {_share(waiting)}", heat(waiting)), seg("  ")]
    rest = seg("─" * (room - len(bar)), FRAME)
    return fit([*head, seg(bar, heat(waiting)), rest, *tail, _state_segment(spheres.state[sphere], 7)], width)


def _strips(view: RunView, members: tuple[tuple[int, ...], ...], inner: int) -> list[Line]:
    """A group a line: a character a sphere (height: throughput, colour: waiting), sum and mean beside it."""
    cells = max(map(len, members))
    columns, width = _columns(inner, STRIP_WIDTH + cells, len(members))
    num_rows = -(-len(members) // columns)
    spheres = view.spheres
    fastest = max((v for v in spheres.throughput if v is not None), default=0.0) if spheres else 0.0
    lines: list[Line] = []
    for i in range(num_rows):
        line: Line = []
        for g in range(i, len(members), num_rows):  # down first: neighbours stand below each other
            line += [*fit(_strip(view, g, members[g], cells, fastest), width), seg(" " * GAP)]
        lines.append(line[:-1])
    return lines


def _strip(view: RunView, g: int, group: tuple[int, ...], cells: int, fastest: float) -> Line:
    """3 ▇▆▇▇▆▇  1.9k/s  12 %  compute"""
    line: Line = [seg(f"{g:>2} ", STRONG)]
    spheres = view.spheres
    if spheres is None or group[-1] >= len(spheres):
        return [*line, seg("·" * len(group), FRAME)]
    for k in group:
        speed = spheres.throughput[k]
        height = HEIGHTS[min(7, int(8 * (speed or 0.0) / fastest))] if fastest > 0 else "·"
        line.append(seg(height, heat(spheres.waiting[k])))
    speeds = [v for k in group if (v := spheres.throughput[k]) is not None]
    shares = [v for k in group if (v := spheres.waiting[k]) is not None]
    waiting = sum(shares) / len(shares) if shares else None
    unit = "/s" if speeds else "  "
    line += [
        seg(" " * (cells - len(group))),
        seg(f" {compact(sum(speeds) if speeds else None):>5}{unit}", INK),
    ]
    line.append(seg(f" {_share(waiting).replace(' ', '').rjust(4)}", heat(waiting)))
    states = [spheres.state[k] for k in group]
    most = min(set(states), key=lambda state: (-states.count(state), state))
    return [*line, seg(" "), _state_segment(most, 7)]
