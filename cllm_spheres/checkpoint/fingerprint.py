"""Two numerics fingerprints -> what differs, in words. Bits are promised only where nothing differs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_ABSENT = object()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One entry for each value that differs, such as "numba 0.61.0 -> 0.62.1", sorted by name.

    Both hold JSON's types, nested to any depth; a tuple is equal to a list of the same items, because one of
    the two has usually been to disk. Lists of words say what is gone and what is new. Empty where the two are
    equal.
    """
    before, after = dict(_flatten(old)), dict(_flatten(new))
    return [
        f"{'.'.join(path)} {_change(before.get(path, _ABSENT), after.get(path, _ABSENT))}"
        for path in sorted(before.keys() | after.keys())
        if _canonical(before.get(path, _ABSENT)) != _canonical(after.get(path, _ABSENT))
    ]


def _flatten(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping) and (value or not path):
        for key, inner in value.items():
            yield from _flatten(inner, (*path, str(key)))
    else:
        yield path, value


def _change(old: Any, new: Any) -> str:
    if _is_words(old) and _is_words(new):
        words = [f"-{word}" for word in old if word not in new] + [f"+{word}" for word in new if word not in old]
        if words:
            return " ".join(words)
    before, after = _word(old), _word(new)
    if before == after:  # "1" and 1
        before, after = _canonical(old), _canonical(new)
    return f"{before} -> {after}"


def _is_words(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else _canonical(value)


def _canonical(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, sort_keys=True)
