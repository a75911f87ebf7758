"""Records of runs -> means, paired differences and losses at equal time, each with its interval.

A pair is two runs of the same seed: the same order of the data, and beside the lattice the same first weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from cllm_spheres_bench.crystal_grid import Cell
from cllm_spheres_bench.crystal_stats import Interval, holm, interval

Curve = list[list[float]]  # [step, validation loss], by step
LEVEL = 0.05


@dataclass(frozen=True)
class Comparison:
    """The loss of one less that of another, over the seeds that both have; below 0 the one is better."""

    name: tuple[str, ...]  # the first cells of its row
    difference: Interval
    holm_p: float | None = None

    @property
    def verdict(self) -> str:
        """By the interval; with a star where Holm's correction of the whole table leaves it."""
        if self.difference.half is None:
            return "one seed"
        word = {-1: "better", 0: "no difference", 1: "worse"}[self.difference.sign]
        return word + "*" * (self.difference.sign != 0 and self.holm_p is not None and self.holm_p < LEVEL)


class Curves:
    """The curves of a preset on a corpus, by cell and seed."""

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        self.of: dict[Cell, dict[int, Curve]] = {}
        for record in records:
            cell = Cell(record["loss"], record["alpha"], record["init"])
            self.of.setdefault(cell, {})[record["seed"]] = record["curve"]

    def __contains__(self, cell: Cell) -> bool:
        return cell in self.of

    def final(self, cell: Cell) -> dict[int, float]:
        """The last validation loss of every seed."""
        return {seed: curve[-1][1] for seed, curve in self.of.get(cell, {}).items()}

    def mean(self, cell: Cell) -> Interval | None:
        """Of the last losses; None where no run is done."""
        found = self.final(cell)
        return interval(list(found.values())) if found else None

    def difference(self, cell: Cell, other: Cell) -> Interval | None:
        """Of the last losses, paired by seed; None where no seed has both."""
        own, others = self.final(cell), self.final(other)
        pairs = [own[seed] - others[seed] for seed in sorted(own.keys() & others.keys())]
        return interval(pairs) if pairs else None

    def equal_time(self, cell: Cell, ratio: float) -> Interval | None:
        """As `difference` to cross-entropy, but at the step that is reached when cross-entropy ends.

        ratio: of a step's seconds to cross-entropy's. A cheaper step changes nothing: its run has no more steps.
        """
        own, others = self.of.get(cell, {}), self.final(cell.plain)
        pairs = [
            at(own[seed], own[seed][-1][0] / max(1.0, ratio)) - others[seed]
            for seed in sorted(own.keys() & others.keys())
        ]
        return interval(pairs) if pairs else None

    def pooled(self, pairs: list[tuple[Cell, Cell]]) -> Interval | None:
        """The mean difference over pairs of cells, one value a seed that has all of them: what they share."""
        each = [
            {seed: own[seed] - others[seed] for seed in own.keys() & others.keys()}
            for own, others in ((self.final(a), self.final(b)) for a, b in pairs)
        ]
        seeds = set.intersection(*map(set, each)) if each else set()
        values = [sum(found[seed] for found in each) / len(each) for seed in sorted(seeds)]
        return interval(values) if values else None


def at(curve: Curve, step: float) -> float:
    """The loss at a step, on the lines between the evaluations; the nearest end outside of them."""
    if step <= curve[0][0]:
        return curve[0][1]
    for (s0, loss0), (s1, loss1) in itertools.pairwise(curve):
        if step <= s1:
            return loss0 + (loss1 - loss0) * (step - s0) / (s1 - s0)
    return curve[-1][1]


def corrected(comparisons: list[Comparison]) -> list[Comparison]:
    """With Holm's p-values over all comparisons that have one."""
    raised = iter(holm([c.difference.p for c in comparisons if c.difference.p is not None]))
    return [c if c.difference.p is None else replace(c, holm_p=next(raised)) for c in comparisons]


def best_alpha(curves: Curves, loss: str, alphas: Iterable[float]) -> float | None:
    """The alpha with the lowest mean loss over both initialisations; None where a run is missing."""
    means = {}
    for alpha in alphas:
        found = [curves.mean(Cell(loss, alpha, init)) for init in {cell.init for cell in curves.of}]
        if not found or any(mean is None for mean in found):
            return None
        means[alpha] = sum(mean.mean for mean in found if mean) / len(found)
    return min(means, key=lambda alpha: means[alpha]) if means else None
