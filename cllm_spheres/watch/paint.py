"""Colours, numbers as people read them, and lines of rich segments that fit a width exactly."""

from __future__ import annotations

from rich.cells import cell_len as unicode_len
from rich.cells import set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style

Line = list[Segment]

INK = Style.parse("#c9d1d9")
STRONG = Style.parse("bold #f0f6fc")
DIM = Style.parse("#7d8590")
FRAME = Style.parse("#3b4350")
TITLE = Style.parse("bold #79c0ff")
ACCENT = Style.parse("#58d5ff")
FAINT = Style.parse("#2f6f8f")
WARM = Style.parse("#ffb454")
GOOD = Style.parse("#56d364")
BAD = Style.parse("bold #ff7b72")
NOTE = Style.parse("#f2cc60")
VIOLET = Style.parse("#d2a8ff")

PHASE_STYLES = {
    "pack": NOTE,
    "compute": GOOD,
    "waiting": WARM,
    "gather": ACCENT,
    "update": VIOLET,
    "other": DIM,
}
STATE_STYLES = {
    "starting": NOTE,
    "running": GOOD,
    "evaluating": ACCENT,
    "stopping": NOTE,
    "ended": TITLE,
    "failed": BAD,
}
HEIGHTS = "▁▂▃▄▅▆▇█"


def _gradient(stops: list[tuple[int, int, int]], num: int) -> list[Style]:
    styles = []
    for i in range(num):
        x = i / (num - 1) * (len(stops) - 1)
        k = min(int(x), len(stops) - 2)
        mixed = [a + (b - a) * (x - k) for a, b in zip(stops[k], stops[k + 1], strict=True)]
        styles.append(Style.parse("#{:02x}{:02x}{:02x}".format(*(round(v) for v in mixed))))
    return styles


# Share of time waiting, 0 to 1: green, yellow, red.
HEAT = _gradient([(63, 201, 110), (226, 205, 84), (240, 112, 92)], 12)


def heat(share: float | None) -> Style:
    """The colour of a share of time waiting."""
    return DIM if share is None else HEAT[min(len(HEAT) - 1, int(share * len(HEAT)))]


# Lines


def clean(text: str) -> str:
    """Text of others for one line of a terminal: without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def cell_len(text: str) -> int:
    return len(text) if text.isascii() else unicode_len(text)


def seg(text: str, style: Style = INK) -> Segment:
    return Segment(text, style)


def length(line: Line) -> int:
    return sum(cell_len(s.text) for s in line)


def fit(line: Line, width: int) -> Line:
    """The line, cut or filled with blanks to exactly `width` cells."""
    result: Line = []
    left = width
    for segment in line:
        cells = cell_len(segment.text)
        if cells > left:
            result.append(Segment(set_cell_size(segment.text, left), segment.style))
            return result
        result.append(segment)
        left -= cells
    if left:
        result.append(Segment(" " * left))
    return result


def spread(left: Line, right: Line, width: int) -> Line:
    """`left` and `right` at the two ends of `width`; where both do not fit, the right one goes."""
    gap = width - length(left) - length(right)
    return [*left, Segment(" " * gap), *right] if gap >= 1 else fit(left, width)


def beside(blocks: list[list[Line]]) -> list[Line]:
    """Blocks of lines of equal number, side by side."""
    return [[s for line in row for s in line] for row in zip(*blocks, strict=True)]


def box(title: Line, lines: list[Line], width: int, height: int, foot: Line | None = None) -> list[Line]:
    """A rounded frame of exactly width x height, with a title in its upper and a foot in its lower edge."""
    inner = width - 4
    title, foot = _crop(title, inner - 2), _crop(foot or [], inner - 2)
    top = [seg("╭─ ", FRAME), *title, seg(" " + "─" * (inner - length(title) - 1) + "╮", FRAME)]
    if foot:
        gap = inner - length(foot) - 1
        bottom = [seg("╰" + "─" * gap + " ", FRAME), *foot, seg(" ─╯", FRAME)]
    else:
        bottom = [seg("╰" + "─" * (width - 2) + "╯", FRAME)]
    body = [[seg("│ ", FRAME), *fit(line, inner), seg(" │", FRAME)] for line in lines[: height - 2]]
    blank = [seg("│", FRAME), Segment(" " * (width - 2)), seg("│", FRAME)]
    return [top, *body, *[blank] * (height - 2 - len(body)), bottom]


def _crop(line: Line, width: int) -> Line:
    return line if length(line) <= width else fit(line, max(0, width))


class Frame:
    """Lines -> a rich renderable; neighbouring segments of one style are joined, which halves the cost."""

    def __init__(self, lines: list[Line]) -> None:
        self.lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for i, line in enumerate(self.lines):
            if i:
                yield Segment.line()
            text, style = "", None
            for segment in line:
                if segment.style is style:
                    text += segment.text
                else:
                    if text:
                        yield Segment(text, style)
                    text, style = segment.text, segment.style
            yield Segment(text, style)
