"""A `RunView` and the size of a terminal -> the dashboard, live or as an SVG picture.

Text is built directly: a table of rich for 63 spheres costs 31.6 ms a refresh, this about a tenth.
"""

from __future__ import annotations

import contextlib
import io
import re
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.segment import Segment

from cllm_spheres.config import read_toml
from cllm_spheres.errors import InputError
from cllm_spheres.watch import groups, numbers, panels
from cllm_spheres.watch.paint import NOTE, Frame, Line, beside, clean, fit, seg
from cllm_spheres.watch.reader import Reader
from cllm_spheres.watch.view import RunView

REFRESH_S = 1.0
MIN_WIDTH = 40  # below it, lines are cut
MIN_CURVES = 9  # lines of the plot with its frame


def render(view: RunView, width: int, height: int, *, now: float, notice: str = "", colour: bool = True) -> list[Line]:
    """At most `height` lines of exactly `width` cells."""
    width, height = max(20, width), max(4, height)
    top = [panels.head(view, now, width), panels.progress(view, now, width)]
    bottom: list[Line] = []
    left = height - len(top)
    if left >= MIN_CURVES + 2:
        bottom += panels.phases(view, width, colour)
        left -= 2
    num_messages = 0 if left < 14 else 1 if height < 26 or width < 64 else 2 if height < 30 else 4
    if left - num_messages >= MIN_CURVES + 3:
        spheres = groups.panel(view, width, left - num_messages - MIN_CURVES)
        if height >= 40 and len(spheres) > (left - num_messages) * 0.6:
            spheres = groups.panel(view, width, int((left - num_messages) * 0.6))
        bottom += spheres
        left -= len(spheres)
    if num_messages:
        bottom += _last_lines(view, width, num_messages, notice)
        left -= num_messages
    lines = [*top, *_middle(view, width, left, notice), *bottom][:height]
    return lines if width >= MIN_WIDTH else [fit(line, width) for line in lines]


def _middle(view: RunView, width: int, height: int, notice: str) -> list[Line]:
    """The curves and the numbers side by side; numbers alone where the terminal is narrow."""
    if height < 3:
        return []
    if width < 64:
        if height < MIN_CURVES + 11:
            return numbers.panel(view, width, height)
        return [*panels.curves(view, width, height - 11, notice), *numbers.panel(view, width, 11)]
    side = 48 if width >= 120 else 38 if width >= 100 else 34 if width >= 76 else 30
    return beside([panels.curves(view, width - side, height, notice), numbers.panel(view, side, height)])


def _last_lines(view: RunView, width: int, num: int, notice: str) -> list[Line]:
    lines: list[Line] = [[seg(" "), seg(clean(notice), NOTE)]] if notice else []
    lines = panels.messages(view, width, num - len(lines)) + lines if num > len(lines) else lines
    return [fit(line, width) for line in [*lines, *[[]] * (num - len(lines))]]


class Dashboard:
    """The live dashboard on the other screen of a terminal; its last state stays on the usual one."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.notice = ""
        self._live = Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False,
                          redirect_stderr=False, transient=True)  # fmt: skip

    def start(self) -> None:
        self._live.start()

    def draw(self, view: RunView) -> None:
        width, height = self.console.size
        self._live.update(self._frame(view, width, height), refresh=True)

    def stop(self, view: RunView) -> None:
        """Leave the other screen, and print the state as it stands now."""
        self._live.stop()
        width, height = self.console.size
        self.console.print(self._frame(view, width, max(4, min(height - 1, 48))))

    def _frame(self, view: RunView, width: int, height: int) -> Frame:
        colour = self.console.color_system is not None and not self.console.no_color
        return Frame(render(view, width, height, now=time.time(), notice=self.notice, colour=colour))


def svg(run_or_view: Path | RunView, path: Path, width: int = 120, height: int = 40) -> None:
    """Write the dashboard of a run folder or of a view, as it stands at its last record, as a picture."""
    view = run_or_view if isinstance(run_or_view, RunView) else read(run_or_view)
    console = Console(file=io.StringIO(), record=True, width=width, height=height, force_terminal=True,
                      color_system="truecolor", legacy_windows=False, _environ={})  # fmt: skip
    now = view.last_time if view.last_time is not None else time.time()
    console.print(Frame([_pinned(line) for line in render(view, width, height, now=now)]))
    picture = console.export_svg(title=clean(f"cllm-spheres watch {view.name}"))
    # Without the fonts that rich would load from the network: the viewer's own monospace font does.
    path.write_text(re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL), encoding="utf-8")


def _pinned(line: Line) -> Line:
    """Blanks before a text as segments of their own: some viewers of SVG drop them and move the text."""
    result: Line = []
    for segment in line:
        text = segment.text.lstrip(" ")
        if text and len(text) < len(segment.text):
            result.append(Segment(" " * (len(segment.text) - len(text))))
        result.append(Segment(text, segment.style) if text else segment)
    return result


def read(run: Path) -> RunView:
    """The view of a run folder as it is now."""
    view = open_view(run)
    reader = Reader(run / "metrics.jsonl")
    while records := reader.read():
        for record in records:
            view.add(record)
    return view


def open_view(run: Path) -> RunView:
    """A view with the name and the configuration of a run folder, without its records."""
    view = RunView(run.resolve().name)
    if (run / "config.toml").is_file():  # else it is not written yet: the start event has what matters
        with contextlib.suppress(InputError):
            view.configure(read_toml(run / "config.toml"))
    return view
