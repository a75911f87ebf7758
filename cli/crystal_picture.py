"""A corpus -> the views of the crystal as pictures, PNG or SVG; the same corpus gives the same bytes of SVG."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from cllm_spheres_cli.crystal_corpus import Corpus
from cllm_spheres_cli.crystal_terminal import RAMP, members, most_similar, ring_of, similarities_of
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from cllm_spheres.crystal.lattice import GROUPS, placement
from cllm_spheres.crystal.primes import gcd, sieve
from cllm_spheres.crystal.similarity import gcd_term, ulam_term
from cllm_spheres.crystal.ulam import places
from cllm_spheres.errors import InputError

HEAT = LinearSegmentedColormap.from_list("heat", [[channel / 255 for channel in rgb] for rgb in RAMP])
_INK = "#222222"
_MOST_LABELS = 15  # numbers on a side of the spiral whose tokens are written
_LARGEST_MATRIX = 2000
_LIGHT = 0.6  # heat above which letters are black
_INCHES = 7.0  # of a square picture


def write(path: Path, figure: Figure) -> None:
    """Save a figure; InputError where the file cannot be written."""
    kind = path.suffix.lower().removeprefix(".")
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "crystal"}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a font has not every character: a box stands in for it
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    try:
        path.write_bytes(buffer.getvalue())
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror}.") from None


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def spiral(corpus: Corpus, count: int | None, *_: object) -> Figure:
    """Numbers as squares coloured by how frequent their tokens are, primes with a dot; few of them with text."""
    count = count or corpus.size
    ring = ring_of(count)
    side = 2 * ring + 1
    shades = np.full((side, side), np.nan)
    x, y = places(np.arange(1, count + 1)).T
    shades[y + ring, x + ring] = corpus.heat_V[:count]
    size = min(12.0, max(_INCHES, 0.75 * side)) if side <= _MOST_LABELS else _INCHES
    figure, axes = _figure(size * 1.12, size)
    edge = ring + 0.5
    image = axes.imshow(shades, cmap=HEAT, vmin=0, vmax=1, origin="lower", extent=(-edge, edge, -edge, edge))
    primes = sieve(count)
    if side <= _MOST_LABELS:
        is_prime = set(primes.tolist())
        for n in range(1, count + 1):
            ink = "black" if corpus.heat_V[n - 1] > _LIGHT else "white"
            place = float(x[n - 1]), float(y[n - 1])
            weight = "bold" if n in is_prime else "normal"
            axes.text(place[0], place[1] + 0.22, f"{n}{'*' * (n in is_prime)}", ha="center", va="center", color=ink,
                      fontsize=7, fontweight=weight, parse_math=False)  # fmt: skip
            axes.text(place[0], place[1] - 0.18, _cut(corpus.label(n), 7), ha="center", va="center", color=ink,
                      fontsize=7, parse_math=False)  # fmt: skip
    else:
        dot = (72 * _INCHES * 0.8 / side * 0.45) ** 2
        inks = np.where(corpus.heat_V[primes - 1] > _LIGHT, "black", "white")
        axes.scatter(x[primes - 1], y[primes - 1], s=dot, c=inks, edgecolors="none")
    axes.set_xticks([])
    axes.set_yticks([])
    mark = "* prime" if side <= _MOST_LABELS else "dots: primes"
    axes.set_title(f"{count:,} tokens on Ulam's spiral, 1 the most frequent; {mark}", fontsize=10, color=_INK)
    figure.colorbar(image, ax=axes, shrink=0.7, label="log(1 + count), 1 for the most frequent token")
    return figure


def neighbours(corpus: Corpus, count: int | None, number: int | None, gcd_weight: float, ulam_weight: float) -> Figure:
    """Bars of the most similar tokens: the divisors' term and the spiral's."""
    assert number is not None
    found, _ = most_similar(corpus, number, count, gcd_weight, ulam_weight)
    figure, axes = _figure(7.0, min(40.0, 1.6 + 0.24 * len(found)))
    rows = np.arange(len(found))
    common = np.array([gcd_term(gcd(number, n), number, n, gcd_weight) for n in found])
    near = np.array([ulam_term(number, n, ulam_weight) for n in found])
    axes.barh(rows, common, color="#3b528b", label=f"{gcd_weight:g} gcd / larger number")
    axes.barh(rows, near, left=common, color="#5ec962", label=f"{ulam_weight:g} / (1 + distance)")
    axes.set_yticks(rows, [f"{_cut(corpus.label(n), 16)}  {n:,}" for n in found], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("similarity")
    axes.legend(frameon=False)
    axes.set_title(
        f"The neighbours of {_cut(corpus.label(number), 24)}, number {number:,}", parse_math=False, fontsize=10
    )
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def groups(corpus: Corpus, count: int | None, *_: object) -> Figure:
    """The golden spiral with the groups in colours, and each group's share of the text."""
    figure = Figure(figsize=(11.0, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    points = np.array([placement(n) for n in range(1, corpus.size + 1)])
    colours = mpl.colormaps["twilight"](np.arange(GROUPS) / GROUPS)
    size = min(60.0, 40_000 / corpus.size)
    left.scatter(*points.T, s=size, c=colours[np.arange(1, corpus.size + 1) % GROUPS], edgecolors="none")
    left.set_aspect("equal")
    left.set_axis_off()
    left.set_title(f"{corpus.size:,} tokens on the golden spiral, coloured by group", fontsize=10)
    shares = [float(corpus.shares_V[members(corpus, g) - 1].sum()) for g in range(GROUPS)]
    right.barh(range(GROUPS), shares, color=colours, edgecolor=_INK, linewidth=0.4)
    for g, share in enumerate(shares):
        first = "  ".join(_cut(corpus.label(int(n)), 9) for n in members(corpus, g)[: count or 5])
        right.text(share, g, f" {first}", va="center", fontsize=7, parse_math=False)
    right.set_yticks(range(GROUPS))
    right.set_ylabel("number mod 12")
    right.invert_yaxis()
    right.set_xlabel("share of the text, and the most frequent tokens")
    right.set_xlim(0, 1.9 * max(max(shares), 1e-9))
    right.spines[["top", "right"]].set_visible(False)
    return figure


def matrix(corpus: Corpus, count: int | None, number: int | None, gcd_weight: float, ulam_weight: float) -> Figure:
    """The similarities of the most frequent tokens with each other."""
    count = count or min(corpus.size, 100)
    if count > _LARGEST_MATRIX:
        raise InputError(
            f"A matrix of {count:,} tokens is more than a picture shows: give --count {_LARGEST_MATRIX:,}."
        )
    figure, axes = _figure(_INCHES * 1.15, _INCHES)
    largest = gcd_weight + ulam_weight or 1.0
    image = axes.imshow(similarities_of(count, gcd_weight, ulam_weight), cmap=HEAT, vmin=0, vmax=largest,
                         extent=(0.5, count + 0.5, count + 0.5, 0.5))  # fmt: skip
    if count <= 50:
        labels = [_cut(corpus.label(n), 10) for n in range(1, count + 1)]
        axes.set_yticks(range(1, count + 1), labels, fontsize=6, parse_math=False)
        axes.set_xticks(range(1, count + 1), labels, fontsize=6, rotation=90, parse_math=False)
    else:
        axes.set_xlabel("number: rank by frequency + 1")
    figure.colorbar(image, ax=axes, shrink=0.8, label=f"{gcd_weight:g} gcd / max + {ulam_weight:g} / (1 + distance)")
    axes.set_title(f"Similarity of the {count:,} most frequent tokens", fontsize=10)
    return figure


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "\u2026"


FIGURES = {"spiral": spiral, "neighbours": neighbours, "groups": groups, "matrix": matrix}
