"""One thing that was looked at -> its state, what was found with numbers, and what to do where it is not ok."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

WHERE_IT_FAILS = "Something of the system or of the installation is not as expected: see the reason, or install anew."

State = Literal["ok", "note", "bad"]


@dataclass(frozen=True)
class Finding:
    """state: "ok", "note" (it works, and could be better) or "bad" (training cannot work)."""

    check: str
    state: State
    found: str
    advice: str = ""


Answer = tuple[State, str] | tuple[State, str, str]


def look(check: str, examine: Callable[[], Answer]) -> Finding:
    """What `examine` answers: (state, found) or (state, found, advice). Whatever it raises is bad, with the reason."""
    try:
        return Finding(check, *examine())
    except Exception as error:
        reason = " ".join(str(error).split()) or "no reason given"
        return Finding(check, "bad", f"The check itself failed: {type(error).__name__}: {reason}", WHERE_IT_FAILS)
