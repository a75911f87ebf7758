"""The bytes of a body -> strict JSON; and its fields, each taken once, with its type and its bounds.

Python's own reader accepts NaN, 1e999, repeated names and lone surrogates; none of these is JSON that means something.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from cllm_spheres.errors import nearest, shown
from cllm_spheres.web.refusals import bad

MOST_DIGITS = 20  # of a whole number: any seed fits


def read_json(body: bytes) -> dict[str, Any]:
    """The object in a body. Refused where it is no JSON, or no object."""
    try:
        text = body.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite, parse_int=_short_int
        )
    except UnicodeDecodeError as error:
        raise bad(f"The body is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}.") from None
    except RecursionError:
        raise bad("The body is nested too deeply.") from None
    except ValueError as error:
        raise bad(f"The body is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise bad(f"The body must be a JSON object, not {_kind(value)}.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {shown(name)} stands there twice")
        found[name] = value
    return found


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _finite(word: str) -> float:
    if not math.isfinite(value := float(word)):
        raise ValueError(f"the number {shown(word)} is too large")
    return value


def _short_int(word: str) -> int:
    if len(word) > MOST_DIGITS:
        raise ValueError(f"the number {word[:MOST_DIGITS]}... has {len(word)} digits, at most {MOST_DIGITS} are read")
    return int(word)


def _kind(value: Any) -> str:
    """What JSON calls it."""
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return names.get(type(value), "null")


def well_formed(text: str, name: str) -> str:
    """The text itself. Refused where it holds half of a surrogate pair, which no UTF-8 can say."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise bad(f"{name} holds {error.object[error.start]!r} alone, which is no character.", name) from None
    return text


class Fields:
    """The fields of a body. null is as good as not given, as in OpenAI's API. Each method takes the field out."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._left = {name: value for name, value in body.items() if value is not None}
        self._known: set[str] = set()

    def take(self, name: str) -> Any:
        """The value, or None."""
        self._known.add(name)
        return self._left.pop(name, None)

    def number(self, name: str, low: float, high: float, default: Any) -> Any:
        """A float from low to high."""
        value = self.take(name)
        if value is None:
            return default
        if type(value) not in (int, float):
            raise bad(f"{name} must be a number, not {_kind(value)}.", name)
        if not low <= value <= high:
            raise bad(f"{name} is {value}: give {low:g} to {high:g}.", name)
        return float(value)

    def whole(self, name: str, low: int, high: int, default: Any) -> Any:
        """An int from low to high."""
        value = self.take(name)
        if value is None:
            return default
        if type(value) is not int:
            raise bad(f"{name} must be a whole number, not {shown(value)}.", name)
        if not low <= value <= high:
            raise bad(f"{name} is {value}: give {low} to {high}.", name)
        return value

    def flag(self, name: str) -> bool:
        """true or false; false where it is not given."""
        value = self.take(name)
        if value is not None and type(value) is not bool:
            raise bad(f"{name} must be true or false, not {shown(value)}.", name)
        return bool(value)

    def string(self, name: str, most: int) -> str | None:
        """A string of at most so many characters."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise bad(f"{name} must be a string, not {_kind(value)}.", name)
        if len(value) > most:
            raise bad(f"{name} has {len(value):,} characters: at most {most:,} are allowed.", name)
        return well_formed(value, name)

    def harmless(self, *names: str) -> None:
        """Fields of OpenAI's API that change no text: taken, and left at that."""
        for name in names:
            self.take(name)

    def unsupported(self, neutral: Mapping[str, tuple[Any, ...]], hint: Mapping[str, str]) -> None:
        """Refused where a field of OpenAI's API that this server cannot serve asks for more than nothing."""
        for name, values in neutral.items():
            value = self.take(name)
            same = any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values)
            if value is not None and not same:
                or_give = f", or give {' or '.join(json.dumps(v) for v in values)}" if values else ""
                more = f" {hint[name]}" if name in hint else ""
                raise bad(f"{name} is not supported: leave it out{or_give}.{more}", name, "unsupported_parameter")

    def nothing_else(self) -> None:
        """Refused where a name is left that nobody took."""
        for name in self._left:
            message = f"There is no parameter {shown(name)}: {nearest(name[:60], self._known)}"
            raise bad(message, name[:60], "unknown_parameter")
