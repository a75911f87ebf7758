"""Calls and the values they work on -> where each value lies in the arena.

A value lives from the first call that names it to the last. The largest are placed first, each at the lowest place
where no value lies that lives at the same time. Bits never depend on places.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

LINE = 64  # bytes: places begin at cache lines
V = TypeVar("V", bound=Hashable)


def lifetimes(used: Sequence[Sequence[V]]) -> dict[V, tuple[int, int]]:
    """The values that each call uses -> the numbers of the first and the last call of each value."""
    found: dict[V, tuple[int, int]] = {}
    for number, values in enumerate(used):
        for value in values:
            found[value] = (found[value][0] if value in found else number, number)
    return found


def place(lives: dict[V, tuple[int, int]], sizes: dict[V, int]) -> tuple[dict[V, int], int]:
    """(offset of each value, bytes of all). sizes: in bytes; an arena of nothing has 0."""
    placed: list[tuple[int, int, V]] = []  # offset, end, value
    offsets: dict[V, int] = {}
    for value in sorted(lives, key=lambda v: (-sizes[v], lives[v])):
        first, last = lives[value]
        room = -(-sizes[value] // LINE) * LINE
        at = 0
        for offset, end, other in placed:  # by rising offset
            if lives[other][0] <= last and first <= lives[other][1]:
                if offset >= at + room:
                    break
                at = max(at, end)
        offsets[value] = at
        placed.append((at, at + room, value))
        placed.sort(key=lambda item: item[:2])
    return offsets, max((end for _, end, _ in placed), default=0)
