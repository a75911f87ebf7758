"""Errors and rates of the elementary functions, as JSON has them -> Markdown."""

from __future__ import annotations

from typing import Any

from cllm_spheres_bench.machine import markdown

SIDES = ("ours", "numpy", "torch")


def report(result: dict[str, Any]) -> str:
    """The whole page. result: "facts", "accuracy" and "speed" by dtype and function."""
    parts = ["# Elementary functions\n", _METHOD]
    if result["accuracy"]:
        parts += ["## Errors\n", _errors(result["accuracy"])]
    if result["speed"]:
        parts += ["## Speed, numbers a nanosecond\n", _rates(result["speed"])]
    head = [
        f"{f['machine']}, {f['cores']} cores; {f['system']}, Python {f['python']}" for f in result["facts"].values()
    ]
    lines = [f"- {name}: `{f['command']}`, commit {f['commit']}, {f['date']}" for name, f in result["facts"].items()]
    return "\n".join([*parts, *dict.fromkeys(head), "", *lines, ""])


def _errors(found: dict[str, dict[str, Any]]) -> str:
    rows = []
    for key in sorted(found, key=lambda key: (key.split()[1], key.split()[0])):
        kind, name = key.split()
        one = found[key]
        at = ", ".join(f"{value!r}" for value in one["at"])
        numbers = "all 2**32" if one["exhaustive"] else f"{one['count']:,}"
        reference = f"{one['reference_ulp']:.1g}" if one.get("reference_ulp") is not None else "–"
        rows.append([f"{name}, {kind}", f"**{one['ulp']:.3f}**", at, numbers, str(one["wrong"]), reference])
    head = [
        "function",
        "largest error, ulp",
        "at",
        "numbers compared",
        "wrong specials",
        "reference's error, ulp",
    ]
    return markdown(head, rows)


def _cell(rates: dict[str, Any], side: str) -> str:
    found = rates.get(side)
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})" if found else "–"


def _rates(found: dict[str, dict[str, Any]]) -> str:
    rows = []
    for key in sorted(found, key=lambda key: (key.split()[1], key.split()[0])):
        kind, name = key.split()
        rates = found[key]
        ratios = [
            f"{rates['ours']['median'] / rates[side]['median']:.2f}" if side in rates else "–" for side in SIDES[1:]
        ]
        rows.append([f"{name}, {kind}", *(_cell(rates, side) for side in SIDES), *ratios])
    return markdown(["function", *SIDES, "ours to numpy", "ours to torch"], rows)


_METHOD = """Errors: the largest difference from the true value in units of the last place (ulp) of the result. float32
functions of one argument: every one of the 2**32 arguments, against the float64 function of the same argument, whose
own error is below 2**-27 ulp of a float32. float64, and pow: samples over all the range, against sums of two float64
right to the last column, or the C library's long double (roots, far angles), and all
special values. "Wrong specials" counts results that are not the reference's NaN, infinity or zero with its sign; a
result below the normal range has to be zero. The unit of gelu's slope is at least that of 1/8 where it crosses zero,
from -1.3 to -0.5.

Speed: one thread, arrays of 65,536 numbers that stay in the caches, with the call from Python; ours, numpy and torch in
turn: median and range. torch's GELU is its tanh form, its slope the backward of it for a gradient of 1.
"""
