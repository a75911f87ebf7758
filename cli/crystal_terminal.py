"""A corpus -> the views of the crystal as text, readable with and without colours."""

from __future__ import annotations

import numpy as np
from cllm_spheres_cli.crystal_corpus import Corpus
from rich.cells import cell_len, set_cell_size
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from cllm_spheres.crystal.lattice import GROUPS, group
from cllm_spheres.crystal.primes import factorise, gcd, sieve
from cllm_spheres.crystal.similarity import gcd_term, row, ulam_term
from cllm_spheres.crystal.ulam import numbers, place
from cllm_spheres.errors import InputError

# From rare to frequent, from unlike to like: a ramp that also rises in lightness.
RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_CELL = 7  # columns of a number on the spiral, unless told how many numbers
_LEAST_CELL = 5  # with text
_SHADES = " .:-=+*#%@"
_WIDE = 60  # columns of a terminal that has room for the tokens of the groups
_LABEL = 12  # columns of a token's text beside a matrix


def _console() -> Console:
    return Console(highlight=False)


def _say(console: Console, line: str | Text) -> None:
    console.print(line if isinstance(line, Text) else Text(line), soft_wrap=True)


def _fit(text: str, width: int) -> str:
    """Exactly so many columns; an ellipsis where something is cut off."""
    if cell_len(text) > width:
        text = set_cell_size(text, width - 1) + "\u2026"
    return set_cell_size(text, width)


def heat(share: float) -> Style:
    """Dark to light for 0 to 1, and a colour of letters that can be read on it."""
    where = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    i = min(int(where), len(RAMP) - 2)
    rgb = [round(a + (b - a) * (where - i)) for a, b in zip(RAMP[i], RAMP[i + 1], strict=True)]
    letters = "black" if 2 * rgb[0] + 5 * rgb[1] + rgb[2] > 8 * 110 else "white"
    return Style(color=letters, bgcolor=Color.from_rgb(*rgb).name)


def ring_of(count: int) -> int:
    """The outermost ring that the numbers 1 to count touch."""
    return max(map(abs, place(count)))


def spiral(corpus: Corpus, count: int | None, *_: object) -> None:
    """The numbers on the spiral, each with its token where there is room, primes marked."""
    console = _console()
    if count is None:
        room = console.width // _CELL
        if console.is_terminal:
            room = min(room, (console.height - 6) // 2)
        count = min(corpus.size, (2 * max(0, (room - 1) // 2) + 1) ** 2)
    ring = ring_of(count)
    cell = console.width // (2 * ring + 1)
    if cell < 1:
        fits = (2 * ((console.width - 1) // 2) + 1) ** 2
        raise InputError(
            f"{count:,} numbers make a spiral {2 * ring + 1} wide, and there is room for {console.width}: give --count "
            f"{fits:,} or less, or a picture with --out FILE.svg."
        )
    primes = set(sieve(count).tolist())
    for y in range(ring, -ring - 1, -1):
        on_line = numbers([[x, y] for x in range(-ring, ring + 1)]).tolist()
        if all(n > count for n in on_line):
            continue
        if cell >= _LEAST_CELL:
            _say(console, _spiral_line(corpus, on_line, count, [f"{n}{'*' * (n in primes)}" for n in on_line], cell))
            _say(console, _spiral_line(corpus, on_line, count, None, cell))
        else:
            marks = ["\u25cf" if n in primes else "\u00b7" for n in on_line]
            _say(console, _spiral_line(corpus, on_line, count, marks, min(cell, 2), gap=0))
    mark = "*" if cell >= _LEAST_CELL else "\u25cf"
    share = sum(float(corpus.shares_V[p - 1]) for p in primes)
    _say(console, "")
    _say(
        console,
        f"1 is the most frequent of {corpus.size:,} tokens; colours: how often one occurs. "
        f"{mark} {len(primes):,} of {count:,} numbers are primes; their tokens are {share:.1%} of the text.",
    )


def _spiral_line(
    corpus: Corpus, on_line: list[int], count: int, texts: list[str] | None, cell: int, gap: int = 1
) -> Text:
    line = Text()
    for i, n in enumerate(on_line):
        if n > count:
            line.append(" " * cell)
            continue
        text = corpus.label(n) if texts is None else texts[i]
        line.append(_fit(text, cell - gap), heat(float(corpus.heat_V[n - 1])))
        line.append(" " * gap)
    return line


def neighbours(corpus: Corpus, count: int | None, number: int | None, gcd_weight: float, ulam_weight: float) -> None:
    """The tokens most like one, with both terms of the similarity."""
    assert number is not None
    console = _console()
    found, similarities = most_similar(corpus, number, count, gcd_weight, ulam_weight)
    factors = " * ".join(f"{p}^{k}" if k > 1 else f"{p}" for p, k in factorise(number)) or "1"
    known = "a prime" if factors == str(number) and number > 1 else f"= {factors}"
    x, y = place(number)
    i, times = corpus.id_of(number), corpus.counts_V[number - 1]
    _say(
        console,
        f"{corpus.label(number)}  id {i:,}, {times:,} times, rank {number - 1:,}: number {number:,} {known}, "
        f"group {group(number)}, at ({x}, {y})",
    )
    table = Table()
    table.add_column("token", no_wrap=True)
    for name in ("id", "times", "number", "gcd", "apart", "similar", "by gcd", "by Ulam"):
        table.add_column(name, justify="right")
    largest = gcd_weight + ulam_weight or 1.0
    for n, s in zip(found, similarities, strict=True):
        bx, by = place(n)
        common = gcd(number, n)
        table.add_row(
            Text(corpus.label(n)), f"{corpus.id_of(n):,}", f"{corpus.counts_V[n - 1]:,}", f"{n:,}", f"{common:,}",
            f"{np.hypot(bx - x, by - y):.2f}", Text(f"{s:.4f}", heat(s / largest)),
            f"{gcd_term(common, number, n, gcd_weight):.4f}", f"{ulam_term(number, n, ulam_weight):.4f}",
        )  # fmt: skip
    console.print(table)
    _say(console, f"similar = {gcd_weight:g} gcd / larger number + {ulam_weight:g} / (1 + how far apart on the spiral)")


def most_similar(
    corpus: Corpus, number: int, count: int | None, gcd_weight: float, ulam_weight: float
) -> tuple[list[int], list[float]]:
    """The numbers of the tokens most like one, and how like they are."""
    s_V = row(number, corpus.size, gcd_weight, ulam_weight)
    order = np.argsort(-s_V, kind="stable") + 1
    order = order[order != number][: count or 16]
    return order.tolist(), s_V[order - 1].tolist()


def members(corpus: Corpus, g: int) -> np.ndarray:
    """The numbers of a group, ascending: the most frequent token first."""
    return np.arange(g or GROUPS, corpus.size + 1, GROUPS)


def groups(corpus: Corpus, count: int | None, *_: object) -> None:
    """The 12 groups: how many tokens, what share of the text, and the most frequent of them."""
    console = _console()
    primes = sieve(corpus.size)
    table = Table()
    for name in ("group", "tokens", "primes", "of the text"):
        table.add_column(name, justify="right")
    wide = console.width >= _WIDE
    if wide:
        table.add_column("", no_wrap=True)
        table.add_column("the most frequent", overflow="fold")
    shares = [float(corpus.shares_V[members(corpus, g) - 1].sum()) for g in range(GROUPS)]
    for g, share in enumerate(shares):
        first = [corpus.label(int(n)) for n in members(corpus, g)[: count or 8]]
        bar = "\u2588" * round(10 * share / max(max(shares), 1e-9))
        num_primes = int((primes % GROUPS == g).sum())
        rest = (Text(bar), Text("  ".join(first))) if wide else ()
        table.add_row(f"{g}", f"{len(members(corpus, g)):,}", f"{num_primes:,}", f"{share:.1%}", *rest)
    console.print(table)
    _say(console, "group = number mod 12. But for 2 and 3, primes are in the groups 1, 5, 7 and 11 alone.")


def matrix(corpus: Corpus, count: int | None, number: int | None, gcd_weight: float, ulam_weight: float) -> None:
    """The similarities of the most frequent tokens, in hundredths, or as shades where there are many."""
    console = _console()
    room = console.width - _LABEL - 6
    if count is None:
        count = max(1, min(corpus.size, room // 3))
    if count > max(1, room):
        raise InputError(
            f"{count:,} tokens do not fit {console.width} columns: give --count {max(1, room)} or less, or a picture "
            "with --out FILE.svg."
        )
    cell = 3 if 3 * count <= room else 1
    table = similarities_of(count, gcd_weight, ulam_weight)
    largest = gcd_weight + ulam_weight or 1.0
    if cell == 3:
        _say(console, " " * (_LABEL + 6) + "".join(f"{n % 100:2} " for n in range(1, count + 1)).rstrip())
    for n in range(1, count + 1):
        line = Text(f"{n:>4} {_fit(corpus.label(n), _LABEL)} ")
        for m, s in enumerate(table[n - 1] / largest, 1):
            shown = _SHADES[min(int(s * 10), 9)] if cell == 1 else " = " if m == n else f"{round(100 * s):2} "
            line.append(shown, heat(float(s)))
        _say(console, line)
    _say(console, "")
    unit = "from blank to @" if cell == 1 else "in hundredths"
    itself = "" if cell == 1 else ", marked ="
    _say(console, f"Similarities {unit} of the largest possible, {largest:g}, which a token has with itself{itself}.")


def similarities_of(count: int, gcd_weight: float, ulam_weight: float) -> np.ndarray:
    """Of the numbers 1 to count with each other, float64 [count, count]."""
    return np.array([row(n, count, gcd_weight, ulam_weight) for n in range(1, count + 1)])


SHOWN = {"spiral": spiral, "neighbours": neighbours, "groups": groups, "matrix": matrix}
