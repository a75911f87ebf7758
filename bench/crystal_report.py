"""Curves of every corpus and measured costs -> Markdown: each cell, its difference to cross-entropy, the controls."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cllm_spheres_bench import crystal_cost
from cllm_spheres_bench.crystal_compare import Comparison, Curves, corrected
from cllm_spheres_bench.crystal_grid import CRYSTAL, INITS, LATTICE, PLAIN, RANDOM, SMOOTHING, SOFT, USUAL, Cell
from cllm_spheres_bench.crystal_mass import MOST_FREQUENT
from cllm_spheres_bench.crystal_stats import Interval
from cllm_spheres_bench.machine import markdown

LARGEST_SHARE = 0.05  # of a step, that the loss may cost

HOW = """\
Loss is plain cross-entropy in nats a token over the same pinned tokens of the validation part, whatever was trained
with. Every interval is a 95 % interval by Student's t over the seeds: what other seeds would give on these texts.
Differences are paired: both runs of a pair have the same seed, that is the same order of the data. Below 0 is better.
A verdict is "no difference" where the interval holds 0. With so many comparisons one in twenty is outside by chance;
a star says that Holm's correction over all comparisons of its kind and preset (p < 0.05) leaves it.
At equal time: the loss on a cell's own curve where cross-entropy has ended, by the cost of the arithmetic below. The
schedule is then not quite at its end, as that of a run planned for this time would be."""


@dataclass(frozen=True)
class Part:
    """What one preset has to show. cells: those of the usual initialisation, cross-entropy first."""

    preset: str
    steps: int
    dtype: str
    cells: list[Cell]
    inits: tuple[str, ...]
    corpora: dict[str, Curves]
    tokens: dict[str, int]  # evaluated, by corpus
    missing: int  # runs that are not done
    pictures: dict[str, str]
    masses: dict[str, dict[str, float]]  # of each corpus: what crystal_mass.py found

    def all_cells(self) -> Iterable[Cell]:
        """With every initialisation."""
        return (Cell(cell.loss, cell.alpha, init) for init in self.inits for cell in self.cells)


def shown(value: Interval | None, sign: str = "+") -> str:
    """ "-0.0123 ± 0.0045" """
    if value is None:
        return ""
    text = format(value.mean, f"{sign}.4f")
    return text if value.half is None else f"{text} ± {value.half:.4f}"


def markdown_of(head: dict[str, Any], parts: list[Part], costs: list[dict[str, Any]]) -> str:
    """The whole result as text."""
    lines = [
        "# The crystalline loss and the lattice against their controls", "",
        f"{head['machine']}, {head['cores']} cores, {head['system']}, commit {head['commit']}, {head['date']};"
        f" `{head['command']}`.", "", HOW, "",
    ]  # fmt: skip
    by_kind = {(cost["preset"], cost["dtype"]): cost for cost in costs}
    for part in parts:
        lines += _section(part, by_kind.get((part.preset, part.dtype)))
    lines += ["## Cost of a step", "", *_costs(costs)]
    return "\n".join(lines).rstrip() + "\n"


def _section(part: Part, cost: dict[str, Any] | None) -> list[str]:
    lines = [f"## {part.preset}", "", f"{part.steps:,} steps, {part.dtype}.", ""]
    if part.missing:
        lines += [f"**{part.missing} runs are not done.** The same command goes on with them.", ""]
    if not any(curves.of for curves in part.corpora.values()):
        return lines
    if len(part.inits) > 1 or len(part.cells) > len(SOFT) + 1:
        lines += ["### In short", "", _short(part), ""]
    against = corrected([
        Comparison((corpus, str(cell), cell.init), difference)
        for corpus, curves in part.corpora.items() for cell in part.all_cells()
        if cell.loss != PLAIN and (difference := curves.difference(cell, cell.plain))
    ])  # fmt: skip
    by_name = {comparison.name: comparison for comparison in against}
    controls, begun = corrected(_controls(part)), corrected(_begun(part))
    for corpus, curves in part.corpora.items():
        lines += [f"### {corpus}", ""]
        if corpus in part.tokens:
            lines += [f"On {part.tokens[corpus]:,} tokens.", ""]
        lines += [_cells(part, corpus, curves, by_name, cost), ""]
        if mass := part.masses.get(corpus):
            lines += [
                f"What the {MOST_FREQUENT} most frequent tokens get: "
                + ", ".join(f"of {name} {share:.0%}" for name, share in mass.items()) + ".", "",
            ]  # fmt: skip
        for title, found in (("of the same alpha", controls), ("of initialisations", begun)):
            own = [comparison for comparison in found if comparison.name[0] == corpus]
            if own:
                lines += [_differences(title, own), ""]
        if corpus in part.pictures:
            lines += [f"![Curves of {part.preset} on {corpus}]({part.pictures[corpus]})", ""]
    return lines


def _cells(
    part: Part, corpus: str, curves: Curves, against: dict[tuple[str, ...], Comparison], cost: dict[str, Any] | None
) -> str:
    rows = []
    for cell in part.all_cells():
        mean = curves.mean(cell)
        if mean is None:
            continue
        row = [str(cell), cell.init, str(mean.n), shown(mean, "")]
        comparison = against.get((corpus, str(cell), cell.init))
        if comparison:
            ratio = crystal_cost.ratio(cost, cell.loss)
            row += [
                shown(comparison.difference), comparison.verdict, _p(comparison.holm_p),
                "not measured" if ratio is None else shown(curves.equal_time(cell, ratio)),
            ]  # fmt: skip
        rows.append(row + [""] * (8 - len(row)))
    return _table(
        [
            "loss",
            "embeddings",
            "seeds",
            "validation loss",
            "less cross-entropy",
            "verdict",
            "p (Holm)",
            "at equal time",
        ],
        rows,
    )


def _pairs(part: Part, loss: str, other: str, inits: Iterable[str]) -> list[tuple[Cell, Cell]]:
    """Cells of a loss and of another one of the same alpha, or cross-entropy."""
    kinds = {(cell.loss, cell.alpha) for cell in part.cells}
    return [
        (cell, twin)
        for init in inits for _, alpha in sorted((kind for kind in kinds if kind[0] == loss), key=str)
        if (twin := Cell(other, None if other == PLAIN else alpha, init)) and (twin.loss, twin.alpha) in kinds
        for cell in [Cell(loss, alpha, init)]
    ]  # fmt: skip


def _controls(part: Part) -> list[Comparison]:
    """The crystal against random neighbours and against smoothing, each with the same alpha."""
    return [
        Comparison((corpus, f"{cell} less {other}", cell.init), difference)
        for corpus, curves in part.corpora.items() for other in (RANDOM, SMOOTHING)
        for cell, twin in _pairs(part, CRYSTAL, other, part.inits) if (difference := curves.difference(cell, twin))
    ]  # fmt: skip


def _begun(part: Part) -> list[Comparison]:
    """The lattice against the usual initialisation, with every loss."""
    return [
        Comparison((corpus, str(cell), f"{LATTICE} less {USUAL}"), difference)
        for corpus, curves in part.corpora.items() if set(INITS) <= set(part.inits) for cell in part.cells
        if (difference := curves.difference(Cell(cell.loss, cell.alpha, LATTICE), cell))
    ]  # fmt: skip


def _differences(title: str, comparisons: list[Comparison]) -> str:
    rows = [[*c.name[1:], shown(c.difference), c.verdict, _p(c.holm_p)] for c in comparisons]
    return _table([f"comparison {title}", "embeddings", "difference", "verdict", "p (Holm)"], rows)


def _short(part: Part) -> str:
    """The mean over all alphas, which has less noise than one cell: a row a question."""
    questions = [
        (f"{loss} less {other}, {init}", _pairs(part, loss, other, (init,)))
        for init in part.inits
        for loss, other in [*((loss, PLAIN) for loss in SOFT), (CRYSTAL, RANDOM), (CRYSTAL, SMOOTHING)]
    ]
    if set(INITS) <= set(part.inits):
        both = [(Cell(cell.loss, cell.alpha, LATTICE), cell) for cell in part.cells]
        questions.append((f"{LATTICE} less {USUAL}, with {PLAIN}", both[:1]))
        questions.append((f"{LATTICE} less {USUAL}, mean over all losses", both))
    rows = []
    for question, pairs in questions:
        found = [curves.pooled(pairs) for curves in part.corpora.values()]
        if any(found):
            rows.append([question, *(_with_verdict(value) for value in found)])
    return _table(["mean over alphas", *part.corpora], rows)


def _with_verdict(value: Interval | None) -> str:
    return "" if value is None else f"{shown(value)}: {Comparison((), value).verdict}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return markdown(head, rows).rstrip("\n")


def _p(p: float | None) -> str:
    return "" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _costs(costs: list[dict[str, Any]]) -> list[str]:
    """The table of costs, and how far they are from what is allowed."""
    if not costs:
        return ["Not measured yet: `--only cost`."]
    rows = []
    for cost in costs:
        turns = cost["turns"]
        for loss, found in cost["arithmetic"].items():
            if loss == PLAIN:
                continue
            row = [
                f"{cost['preset']}, {cost['dtype']}", f"{cost['vocab_size']:,}", loss,
                f"{cost['arithmetic'][PLAIN]['seconds'] * 1e3:.2f} ms",
                f"{found['ratio'] - 1:+.2%} ({found['low'] - 1:+.2%} to {found['high'] - 1:+.2%})",
            ]  # fmt: skip
            if turns[loss]:
                step = crystal_cost.ratios_of(turns, loss)
                row += [
                    f"{statistics.median(turns[PLAIN]) * 1e3:.2f} ms",
                    f"{statistics.median(step) - 1:+.1%} ({min(step) - 1:+.1%} to {max(step) - 1:+.1%})",
                ]
            rows.append(row + [""] * (7 - len(row)) + [f"{cost['load_before']:.1f}"])
    head = ["model", "vocabulary", "loss", "arithmetic", "more arithmetic", "step", "more time a step", "load before"]
    return [
        "Arithmetic: processor time of a sphere's part of a step with cross-entropy on one core, and how much more it"
        " is with another loss, call by call in turn: the median and its 95 % interval. The aim: at most"
        f" {LARGEST_SHARE:.0%}. Step: the wall clock of whole trainings in turn, the median over rounds and their"
        " range; it feels what else the machine does. Load before: processes that wanted a core a minute before.",
        "", _table(head, rows),
    ]  # fmt: skip


def _table(head: list[str], rows: list[list[str]]) -> str:
    return markdown(head, rows).rstrip("\n")


def _p(p: float | None) -> str:
    return "" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001"
