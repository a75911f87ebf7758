"""What went wrong -> an exception that says what happened, the numbers, and what to do next.

The command line prints the message without a traceback and leaves with `exit_code`.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


class SpheresError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1


class InputError(SpheresError, ValueError):
    """The user's input cannot work: a missing folder, an unknown option, numbers that do not fit."""

    exit_code = 2


class RunFailed(SpheresError, RuntimeError):
    """A run that had started could not go on. Its checkpoints are intact."""


class SphereLost(RunFailed):
    """A worker process ended or hung; the message names its spheres, the signal and the last checkpoint."""


class FolderGone(RunFailed):
    """The folder of a run was removed while the run went on: nothing can be saved any more."""


class NonFinite(RunFailed):
    """A loss or a gradient was NaN or infinite."""


class Interrupted(SpheresError):
    """The run was asked to stop by a signal, and saved. `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def shown(value: object) -> str:
    """A value as Python writes it, its middle left out where it is long: for a message that repeats it."""
    return _short.repr(value)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that names the known word most like `word`, or lists all of them: to append to a message."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(known)
