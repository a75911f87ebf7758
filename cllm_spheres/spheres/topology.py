"""The number of spheres -> who stands where: 12 around Node Zero, up to 12 around each of those.

Spheres fill level 1 first, then level 2 evenly over its parents: 63 spheres are 12 + 51, so that three spheres of
level 1 have 5 children and nine have 4. There are 1 + 12 + 144 = 157 places with Node Zero's own.
"""

from __future__ import annotations

KISSING = 12  # how many equal spheres touch one in three dimensions
MAX_SPHERES = KISSING + KISSING * KISSING


def level(sphere: int) -> int:
    """1 for the spheres around Node Zero, 2 for those around them."""
    return 1 if sphere < KISSING else 2


def children(sphere: int, num_spheres: int) -> range:
    """The level-2 spheres around a level-1 sphere, in a row; the first (rest mod 12) parents get one more."""
    if sphere >= KISSING:
        return range(0)
    each, more = divmod(max(0, num_spheres - KISSING), KISSING)
    first = KISSING + each * sphere + min(sphere, more)
    return range(first, first + each + (sphere < more))


def parent(sphere: int, num_spheres: int) -> int | None:
    """The level-1 sphere that a level-2 sphere touches; None for level 1, whose parent is Node Zero."""
    if sphere < KISSING:
        return None
    each, more = divmod(num_spheres - KISSING, KISSING)
    i = sphere - KISSING
    return i // (each + 1) if i < more * (each + 1) else more + (i - more * (each + 1)) // each


def siblings(sphere: int, num_spheres: int) -> list[int]:
    """The other children of the same parent: the neighbours that it kisses, at most 11."""
    above = parent(sphere, num_spheres)
    family = range(min(KISSING, num_spheres)) if above is None else children(above, num_spheres)
    return [other for other in family if other != sphere]


def group(sphere: int, num_spheres: int) -> int:
    """Which of the 12 groups a sphere belongs to: its level-1 sphere's number."""
    above = parent(sphere, num_spheres)
    return sphere if above is None else above


def hosted(worker: int, num_workers: int, num_spheres: int) -> range:
    """The spheres that a worker computes; dealt in turn, so that larger shards spread evenly."""
    return range(worker, num_spheres, num_workers)


def span(worker: int, num_workers: int, num_blocks: int) -> tuple[int, int]:
    """The run [first, last) of whole blocks that a worker gathers and updates."""
    return worker * num_blocks // num_workers, (worker + 1) * num_blocks // num_workers
