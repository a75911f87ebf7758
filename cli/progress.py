"""Progress of long work -> a bar with the time left on a terminal, else a few plain lines; and signals."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from cllm_spheres.errors import Interrupted

if TYPE_CHECKING:
    from rich.console import Console

_NAMES = {"read": "Reading", "vocabulary": "Making the vocabulary", "tokens": "Encoding", "score": "Evaluating"}
_IN_TOKENS = ("score",)  # stages that are not counted in bytes
_PLAIN_EVERY_S = 10.0


@contextlib.contextmanager
def progress_of(console: Console) -> Iterator[Callable[[str, float, float], None]]:
    """A callback (stage, done, total) that shows how far it is; in bytes, or in tokens for some stages."""
    if not console.is_terminal:
        yield _Plain(console)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    amount = TextColumn("{task.fields[amount]}")
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: float, total: float) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(_NAMES.get(stage, stage), total=total, amount="")
            bars.update(tasks[stage], completed=done, total=total, amount=_amount(stage, done, total))

        yield show


def _amount(stage: str, done: float | None, total: float) -> str:
    """ "1.2 of 3.4 MB", "12 of 34 tokens" """
    form, unit = (",.0f", "tokens") if stage in _IN_TOKENS else (",.1f", "MB")
    numbers = [number if stage in _IN_TOKENS else number / 1e6 for number in (done, total) if number is not None]
    return f"{' of '.join(format(number, form) for number in numbers)} {unit}"


class _Plain:
    """One line as a stage begins, then one every few seconds with the time that remains."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = ""
        self._begin = self._last = 0.0

    def __call__(self, stage: str, done: float, total: float) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._begin, self._last = stage, now, now
            self._say(f"{_NAMES.get(stage, stage)}: {_amount(stage, None, total)}")
        elif now - self._last >= _PLAIN_EVERY_S and 0 < done < total:
            self._last = now
            left_s = (now - self._begin) * (total - done) / done
            self._say(f"{_NAMES.get(stage, stage)}: {done / total:.0%}, {left_s:,.0f} s left")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def interruptible(what: str) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP become `Interrupted` with their exit code, once all is cleaned up."""

    def stop(number: int, _: object) -> None:
        raise Interrupted(f"Stopped by {signal.Signals(number).name}. {what}", number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
