"""A run folder that grows -> what a person sees, until the run has ended: a dashboard, or plain lines."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rich.console import Console

from cllm_spheres.errors import InputError
from cllm_spheres.units import time_of_day
from cllm_spheres.watch.dashboard import REFRESH_S, Dashboard, open_view
from cllm_spheres.watch.paint import clean
from cllm_spheres.watch.plain import Plain
from cllm_spheres.watch.reader import Reader
from cllm_spheres.watch.records import number
from cllm_spheres.watch.view import RunView

POLL_S = 0.1


def use_plain(console: Console) -> bool:
    """Whether this console cannot show the dashboard: no terminal, a dumb one, or one without Unicode."""
    return not console.is_terminal or console.is_dumb_terminal or console.options.ascii_only


class Follower:
    """Follows a run in the caller's own loop:

        with Follower(run) as follower:
            while alive():
                follower.poll()
                time.sleep(POLL_S)

    On leaving, also by an exception, it reads what is left and draws the final state.
    """

    def __init__(
        self, run: Path, *, plain: bool | None = None, console: Console | None = None, endings: bool = True,
        since: float = 0.0,
    ) -> None:  # fmt: skip
        """endings: plain lines tell how the run ended, too; without, the caller does.

        since: plain lines only of what happened from this Unix time on.
        """
        self._since = since
        self.run = run
        self.console = console or Console()
        self.view = open_view(run)
        self._configured = (run / "config.toml").exists()
        self._reader = Reader(run / "metrics.jsonl")
        self._drawn = float("-inf")
        self._notice = ""
        self._plain = Plain(self._line, endings) if (use_plain(self.console) if plain is None else plain) else None
        self._dashboard = None if self._plain else Dashboard(self.console)

    def __enter__(self) -> Follower:
        if self._dashboard:
            self._dashboard.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            while self._read():
                pass
        finally:
            if self._plain:
                self._plain.flush(self.view)
            elif self._dashboard:
                self._dashboard.stop(self.view)

    def poll(self) -> RunView:
        """Read what is new; draw it where the last drawing is old enough. Costs little: call it often."""
        self._read()
        if self._dashboard and time.monotonic() - self._drawn >= REFRESH_S:
            self._dashboard.draw(self.view)
            self._drawn = time.monotonic()
        return self.view

    def notice(self, text: str) -> None:
        """A status line, such as 'compiling kernels, once, about 20 s'; the first step, or '', ends it."""
        if text == self._notice:
            return
        self._notice = text
        if self._dashboard:
            self._dashboard.notice = text
            self._drawn = float("-inf")
        elif text:
            self._line(f"{time_of_day(time.time())}  {clean(text)}")

    def _read(self) -> bool:
        """Take what is new, at most a chunk; whether there was something."""
        records = self._reader.read()
        if records and not self._configured and (self.run / "config.toml").exists():  # not while text is prepared
            self.view.name, self.view.facts = (
                (fresh := open_view(self.run)).name,
                fresh.facts | self.view.facts,
            )
            self._configured = True
        for record in records:
            self.view.add(record)
            if self._plain and (number(record, "time") or 0.0) >= self._since:
                self._plain.add(record, self.view)
        if self._notice and any(record.get("kind") == "step" for record in records):
            self.notice("")
        return bool(records)

    def _line(self, text: str) -> None:
        self.console.file.write(text + "\n")
        self.console.file.flush()


def follow(
    run: Path,
    *,
    plain: bool | None = None,
    alive: Callable[[], bool],
    status: Callable[[], str] = lambda: "",
    console: Console | None = None,
    stop_when_ended: bool = True,
    endings: bool = True,
    since: float = 0.0,
) -> RunView:
    """Show a run while `alive()`, or until its records say that it ended; KeyboardInterrupt goes through.

    status: what the run does before its first record.
    """
    with Follower(run, plain=plain, console=console, endings=endings, since=since) as follower:
        while alive():
            view = follower.poll()
            follower.notice(status())
            if stop_when_ended and view.finished:
                break
            time.sleep(POLL_S)
    return follower.view


def find_run(run: Path) -> Path:
    """The folder, if it is one of a run; else InputError that names the nearest one beside it."""
    try:
        if (run / "metrics.jsonl").is_file() or (run / "config.toml").is_file():
            return run
    except OSError as error:
        raise InputError(f"Cannot read {run}: {error.strerror}.") from None
    what = "is not the folder of a run: it has no metrics.jsonl" if run.is_dir() else "does not exist"
    if run.is_file():
        what = "is a file, not the folder of a run"
    places = [run] if run.is_dir() else []
    for place in [*places, run.parent, Path("runs")]:
        try:
            names = [p.name for p in place.iterdir() if (p / "metrics.jsonl").is_file()]
        except OSError:
            continue
        if names:
            close = difflib.get_close_matches(run.name, names, n=1, cutoff=0.0)[0]
            raise InputError(f"{run} {what}. Did you mean {place / close}?")
    raise InputError(f"{run} {what}. Start a run with: cllm-spheres train")
