"""Curves -> lines of braille characters, with axes.

A character holds 2 x 4 dots, so a plot of W x H characters has 2W x 4H dots. x grows to the right and y up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.segment import Segment
from rich.style import Style

from cllm_spheres.units import compact
from cllm_spheres.watch.paint import DIM, FRAME, HEIGHTS, Line, seg
from cllm_spheres.watch.series import Point

# Bits of a braille character by (row, column) of its dot: Unicode chart U+2800.
_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


@dataclass
class Curve:
    """Points to draw: as a line, as single dots, or as a line with a mark at each point."""

    points: Sequence[Point]
    style: Style
    dots: bool = False
    mark: str | None = None


@dataclass
class Reference:
    """A dashed horizontal line with its name on it."""

    value: float
    style: Style
    name: str


class Canvas:
    """width x height characters; what is drawn later covers the colour of what is there."""

    def __init__(self, width: int, height: int, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.width, self.height = width, height
        self.bits = [[0] * width for _ in range(height)]
        self.inks: list[list[Style | None]] = [[None] * width for _ in range(height)]
        self.marks: dict[tuple[int, int], tuple[str, Style]] = {}
        self.x0, self.y1 = x[0], y[1]
        self.x_scale = (2 * width - 1) / ((x[1] - x[0]) or 1)
        self.y_scale = (4 * height - 1) / ((y[1] - y[0]) or 1)

    def column(self, x: float) -> int:
        return round((x - self.x0) * self.x_scale)

    def row(self, y: float) -> int:
        return round(min(1e6, max(-1e6, (self.y1 - y) * self.y_scale)))

    def dot(self, column: int, row: int, style: Style) -> None:
        i, j = row >> 2, column >> 1
        if 0 <= i < self.height and 0 <= j < self.width:
            self.bits[i][j] |= _BITS[row & 3][column & 1]
            self.inks[i][j] = style

    def draw(self, curve: Curve) -> None:
        """A line is drawn through the mean of the points of each column of dots."""
        if curve.dots:
            for x, y in curve.points:
                self.dot(self.column(x), self.row(y), curve.style)
            return
        sums: dict[int, tuple[float, int]] = {}
        for x, y in curve.points:
            column = self.column(x)
            total, count = sums.get(column, (0.0, 0))
            sums[column] = (total + y, count + 1)
        dots = [(column, self.row(total / count)) for column, (total, count) in sums.items()]
        last = 4 * self.height
        for i, (column, row) in enumerate(dots):
            before_column, before_row = dots[i - 1] if i else (column, row)
            for c in range(before_column, column + 1):
                here = _between(before_column, before_row, column, row, c - 0.5)
                there = _between(before_column, before_row, column, row, c + 0.5)
                low, high = sorted((min(last, max(-1, here)), min(last, max(-1, there))))
                for r in range(low, max(low + 1, high)):
                    self.dot(c, r, curve.style)
        if curve.mark:
            for column, row in dots:
                i, j = row >> 2, column >> 1
                if 0 <= i < self.height and 0 <= j < self.width:
                    self.marks[i, j] = curve.mark, curve.style

    def refer(self, line: Reference) -> None:
        row = self.row(line.value)
        for column in range(0, 2 * self.width, 3):
            self.dot(column, row, line.style)

    def name(self, line: Reference) -> None:
        """Write the name of a reference line just over it, at the right, where no curve passes."""
        i = (self.row(line.value) >> 2) - 1
        text = f" {line.name} "
        if not 0 <= i < self.height:
            return
        for j in range(self.width - len(text), self.width // 4, -2):
            if not any(self.bits[i][j : j + len(text)]):
                for k, character in enumerate(text):
                    self.marks[i, j + k] = character, line.style
                return

    def lines(self) -> list[Line]:
        result = []
        for i in range(self.height):
            line: Line = []
            text, ink = "", None
            for j, (bits, style) in enumerate(zip(self.bits[i], self.inks[i], strict=True)):
                character = chr(0x2800 + bits) if bits else " "
                if (i, j) in self.marks:
                    character, style = self.marks[i, j]
                if style is not ink:
                    line.append(Segment(text, ink))
                    text, ink = "", style
                text += character
            result.append([*line, Segment(text, ink)])
        return result


def _between(x0: int, y0: int, x1: int, y1: int, x: float) -> int:
    if x1 == x0:
        return y1
    return round(y0 + (y1 - y0) * min(1.0, max(0.0, (x - x0) / (x1 - x0))))


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round numbers within [low, high], a step of 1, 2 or 5 times a power of ten apart."""
    if not high > low or most < 1:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20):
        first, last = math.ceil(low / (step * factor) - 1e-9), math.floor(high / (step * factor) + 1e-9)
        if last - first + 1 <= most:
            return [k * step * factor for k in range(first, last + 1)]
    return [low]


def plot(
    curves: Sequence[Curve],
    references: Sequence[Reference],
    width: int,
    height: int,
    x: tuple[float, float],
    y: tuple[float, float],
) -> list[Line]:
    """`height` lines of `width` cells: the curves over a y axis with numbers and an x axis with steps."""
    rows = height - 1
    names = _names(ticks(*y, max(3, rows // 3)))
    margin = max(4, *map(len, names.values()))
    canvas = Canvas(width - margin - 2, rows, x, y)
    for reference in references:
        canvas.refer(reference)
    for curve in curves:
        canvas.draw(curve)
    for reference in references:
        canvas.name(reference)
    labels = {min(rows - 1, max(0, canvas.row(value) >> 2)): name for value, name in names.items()}
    lines = []
    for i, line in enumerate(canvas.lines()):
        label = labels.get(i)
        axis = [seg((label or "").rjust(margin), DIM), seg(" ┤" if label else " │", FRAME)]
        lines.append([*axis, *line])
    return [*lines, _x_axis(canvas, margin, x)]


def _names(values: list[float]) -> dict[float, str]:
    """Tick values -> their text, with just the digits that tell them apart."""
    gap = values[1] - values[0] if len(values) > 1 else abs(values[0]) or 1.0
    if gap >= 100:
        return {value: compact(value) for value in values}
    if gap < 1e-4:
        return {value: f"{value:.1e}" for value in values}
    digits = max(1, -math.floor(math.log10(gap) + 1e-9))
    return {value: f"{value:.{digits}f}" for value in values}


def _x_axis(canvas: Canvas, margin: int, x: tuple[float, float]) -> Line:
    """└─ 0 ──────── 500 ─────── 1,000 ─ with each number centred under its place."""
    width = canvas.width
    cells = ["─"] * width
    free = 0
    for value in ticks(*x, max(2, width // 12)):
        if value != int(value):
            continue
        text = f" {int(value):,} "
        start = min(width - len(text), max(0, (canvas.column(value) >> 1) - len(text) // 2))
        if start >= free:
            cells[start : start + len(text)] = text
            free = start + len(text) + 1
    line: Line = [seg(" " * (margin + 1) + "└", FRAME)]
    for ruled, run in groupby(cells, lambda c: c == "─"):
        line.append(seg("".join(run), FRAME if ruled else DIM))
    return line


def spark(points: Sequence[Point], width: int) -> str:
    """One line of block characters, from the least to the greatest value; '' with fewer than 2 points."""
    if len(points) < 2 or width < 2:
        return ""
    first, last = points[0][0], points[-1][0]
    sums = [(0.0, 0)] * width
    for x, y in points:
        j = min(width - 1, int((x - first) / ((last - first) or 1) * width))
        sums[j] = (sums[j][0] + y, sums[j][1] + 1)
    values: list[float] = []
    for total, count in sums:
        values.append(total / count if count else (values[-1] if values else points[0][1]))
    low, high = min(values), max(values)
    if not high > low:
        return HEIGHTS[3] * width
    return "".join(HEIGHTS[min(7, int((v - low) / (high - low) * 8))] for v in values)
