"""A few seconds of each way to train in PyTorch -> the fastest, for the comparison of peers.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cllm_spheres_bench.peer_torch import ATTENTIONS, GELUS, Variant

FINALISTS = 2  # are measured twice


def screen(
    modes: tuple[str, ...], dtype: str, cores: int, measure: Callable[[Variant], float | None]
) -> dict[Variant, float | None]:
    """Tokens/s of PyTorch's variants: every mode and attention on all cores, then the best with what is left.

    The exact GELU and other numbers of threads are tried on the best so far only: they change little else. The two
    fastest are measured once more, and the better figure counts: neighbours differ by less than the machine's noise.
    """
    found: dict[Variant, float | None] = {}

    def best() -> Variant | None:
        return next(iter(fastest(found)), None)

    for mode in modes:
        for attention in ATTENTIONS:
            variant = Variant(dtype, mode, attention, GELUS[0], cores)
            found[variant] = measure(variant)
    if first := best():
        variant = replace(first, gelu=GELUS[1])
        found[variant] = measure(variant)
    for threads in fewer_threads(cores):
        if first := best():
            variant = replace(first, threads=threads)
            found[variant] = measure(variant)
    for variant in fastest(found)[:FINALISTS]:
        found[variant] = max(found[variant] or 0.0, measure(variant) or 0.0)
    return found


def fastest(found: dict[Variant, float | None]) -> list[Variant]:
    """The variants that could be measured, the fastest first."""
    return sorted((v for v, speed in found.items() if speed), key=lambda v: -(found[v] or 0.0))


def fewer_threads(cores: int) -> list[int]:
    """The numbers of threads that are tried besides all cores."""
    return [threads for threads in (1, 2) if threads < cores]


def num_measurements(modes: tuple[str, ...], cores: int) -> int:
    """How often `screen` measures."""
    return len(modes) * len(ATTENTIONS) + 1 + len(fewer_threads(cores)) + FINALISTS
