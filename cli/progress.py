"""Progress of long work -> a bar with the time left on a terminal, else a few plain lines; and signals."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from cllm_spheres.errors import Interrupted
from cllm_spheres.text.prepare import STAGE_NAMES
from cllm_spheres.units import size

if TYPE_CHECKING:
    from rich.console import Console

_NAMES = {**STAGE_NAMES, "score": "Evaluating"}
_IN_TOKENS = ("score",)  # stages that are not counted in bytes
_PLAIN_EVERY_S = 10.0


@contextlib.contextmanager
def progress_of(console: Console) -> Iterator[Callable[[str, float, float], None]]:
    """A callback (stage, done, total) that shows how far it is; in bytes, or in tokens for some stages.

    A line with its seconds is left of each stage that is counted in bytes.
    """
    if not console.is_terminal:
        plain = _Plain(console)
        yield plain
        plain.ended()
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    amount = TextColumn("{task.fields[amount]}")
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}
        times = _Times(console)

        def show(stage: str, done: float, total: float) -> None:
            times.goes_to(stage, total)
            if stage not in tasks:
                tasks[stage] = bars.add_task(_NAMES.get(stage, stage), total=total, amount="")
            bars.update(tasks[stage], completed=done, total=total, amount=_amount(stage, done, total))

        yield show
        times.ended()


class _Times:
    """Tells of each stage that has ended how long it took."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage, self._total, self.began = "", 0.0, 0.0

    def goes_to(self, stage: str, total: float) -> bool:
        """Whether this is another stage than before, which has ended then."""
        if stage == self._stage:
            return False
        self.ended()
        self._stage, self._total, self.began = stage, total, time.monotonic()
        return True

    def ended(self) -> None:
        if self._stage and self._stage not in _IN_TOKENS:
            name, amount = _NAMES.get(self._stage, self._stage), _amount(self._stage, None, self._total)
            self.say(f"{name}: {amount} in {time.monotonic() - self.began:.1f} s")
        self._stage = ""

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _amount(stage: str, done: float | None, total: float) -> str:
    """ "1.2 of 3.4 MB", "12 of 34 tokens"; without what is done "3 MB", "34 tokens" """
    if done is None and stage not in _IN_TOKENS:
        return size(total)
    form, unit = (",.0f", "tokens") if stage in _IN_TOKENS else (",.1f", "MB")
    numbers = [number if stage in _IN_TOKENS else number / 1e6 for number in (done, total) if number is not None]
    return f"{' of '.join(format(number, form) for number in numbers)} {unit}"


class _Plain(_Times):
    """One line as a stage begins, then one every few seconds with the time that remains."""

    _last = 0.0

    def __call__(self, stage: str, done: float, total: float) -> None:
        now = time.monotonic()
        if self.goes_to(stage, total):
            self._last = now
            self.say(f"{_NAMES.get(stage, stage)}: {_amount(stage, None, total)} ...")
        elif now - self._last >= _PLAIN_EVERY_S and 0 < done < total:
            self._last = now
            left_s = (now - self.began) * (total - done) / done
            self.say(f"{_NAMES.get(stage, stage)}: {done / total:.0%}, {left_s:,.0f} s left")


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
