"""The result of the comparison with PyTorch, as JSON has it -> Markdown."""

from __future__ import annotations

from typing import Any

from cllm_spheres_bench.machine import markdown

from cllm_spheres.units import size as in_bytes

DTYPE_NAMES = {"fp32": "float32", "bf16": "bf16"}


def share_of_peak(row: dict[str, Any], side: str, peaks: dict[str, Any]) -> float | None:
    """Model operations a second over the measured peak of matrix products on all workers' cores; None without."""
    by_cores = peaks.get(row["dtype"], {})
    if side not in row or not by_cores:
        return None
    cores = max(by_cores, key=int)
    return row[side]["tokens_per_s"]["median"] * row["flops_per_token"] / (by_cores[cores]["gflops"] * 1e9)


def _spread(values: dict[str, Any] | None, form: str) -> str:
    """Median and, in brackets, the range."""
    if values is None:
        return "–"
    median, least, most = (format(values[key], form) for key in ("median", "min", "max"))
    return f"{median} ({least} to {most})"


def _mode(row: dict[str, Any]) -> str:
    """What our side computed again. Results from before there was a choice do not name it."""
    return str(row.get("recompute", "none"))


def _row(row: dict[str, Any], peaks: dict[str, Any], best: float | None, shows_mode: bool) -> list[str]:
    sides = [row.get(side, {}) for side in ("ours", "theirs")]
    shares = [share_of_peak(row, side, peaks) for side in ("ours", "theirs")]
    found = row.get("loss_differences")
    losses = "–" if not found else ", ".join(f"{d:.0e}" for d in found.values())
    ratio = row.get("ratio")
    over_all = sides[0]["tokens_per_s"]["median"] / best if sides[0] and best else None
    return [
        row["size"], *([_mode(row)] if shows_mode else []),
        *(_spread(side.get("tokens_per_s"), ",.0f") for side in sides),
        f"**{ratio['median']:.2f}** ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else "–",
        f"{over_all:.2f}" if over_all else "–",
        *(f"{share:.0%}" if share else "–" for share in shares),
        *(in_bytes(side.get("pss_bytes")) for side in sides),
        losses if row.get("losses_agree", True) else f"**{losses}**",
    ]  # fmt: skip


def report(result: dict[str, Any]) -> str:
    """The whole page."""
    rows, peaks = result["rows"], result["peaks"]
    shows_mode = any(_mode(row) != "none" for row in rows)
    best = {
        size: max((r["theirs"]["tokens_per_s"]["median"] for r in rows if r["size"] == size and "theirs" in r),
                  default=None)
        for size in {row["size"] for row in rows}
    }  # fmt: skip
    parts = [
        "# Against PyTorch on the same CPU\n",
        f"`{result['command']}`, commit {result['commit']}, {result['date']}  \n"
        f"{result['machine']}, {result['cores']} cores, {in_bytes(result['memory_bytes'])}; {result['system']},"
        f" Python {result['python']}, PyTorch {result['torch']}\n",
        _method(result),
        *(f"{note}\n" for note in result["notes"]),
        "## Peak of matrix products, GFLOP/s\n",
        markdown(
            ["", *(f"{cores} core{'s' * (cores != '1')}" for cores in _cores(peaks))],
            (
                [
                    DTYPE_NAMES[dtype],
                    *(f"{by[cores]['gflops']:,.0f} ({by[cores]['by']})" for cores in _cores(peaks) if cores in by),
                ]
                for dtype, by in peaks.items()
            ),
        ),
    ]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        mine = [row for row in rows if row["dtype"] == dtype]
        head = [
            DTYPE_NAMES[dtype], *(["recompute"] if shows_mode else []), "ours, tokens/s", "PyTorch, tokens/s", "ratio",
            "to its best dtype", "ours, of the peak", "PyTorch", "ours, memory", "PyTorch", "losses differ",
        ]  # fmt: skip
        table = markdown(head, (_row(row, peaks, best[row["size"]], shows_mode) for row in mine))
        parts += [f"## {DTYPE_NAMES[dtype]}\n", table]
        parts += dict.fromkeys(f"{row['size']}: {reason}\n" for row in mine for reason in row["reasons"])
    parts += ["## The models\n", "".join(dict.fromkeys(f"- {r['size']}: {r['describe']}\n" for r in rows))]
    parts += ["## Screening of PyTorch's variants, tokens/s\n", _screening(rows)]
    return "\n".join(parts)


def _cores(peaks: dict[str, Any]) -> list[str]:
    return sorted({cores for by in peaks.values() for cores in by}, key=int)


def _method(result: dict[str, Any]) -> str:
    turns = f"{result['repeats']} turn{'s' * (result['repeats'] != 1)}"
    modes = list(dict.fromkeys(_mode(row) for row in result["rows"]))
    turned = " ".join([*("A" if len(modes) == 1 else f"A({mode})" for mode in modes), "B"] * 2)
    again = (
        " `Recompute`: what ours computes again in the backward pass rather than keep it; the bits are the same."
        if modes != ["none"]
        else ""
    )
    workers = sorted({f"{row['workers']} workers, {row['spheres']} spheres" for row in result["rows"]})
    return (
        f"Median and range of {turns} of each side, {turned}, every turn in processes of its own"
        f" ({'; '.join(workers) or 'ours'}; PyTorch: the best of the screening below, with fused AdamW, foreach"
        f" clipping and gradients set to None). Tokens/s: whole steps within a window of at least"
        f" {result['seconds']:g} s of wall clock, with data, zeroing, clipping, update and metrics. Evaluations and"
        " checkpoints are set so that none falls into a window, on either side. Both start from the same weights and"
        " read the same batches, with the same schedule, decay groups and biases; an erf GELU is PyTorch's where it"
        " is faster. `to its best dtype`: ours over PyTorch's fastest median at that size in any measured dtype."
        " `Losses differ`: relatively, at steps 1 and 20 (allowed: 1e-3 in float32, 2e-2 in bf16)."
        " Memory: the largest sample of the proportional set size of all processes of a side while it trains, its"
        " launcher and compile workers among them; both sides have their compiled code in their caches. A checkpoint"
        f" that is being written takes ours a copy of weights and moments more.{again} Share of the peak: (6 x"
        " parameters of matrix products, the tied head among them, + 12 x layers x width x T / 2 for"
        " causal attention) x tokens/s over the peak on all cores.\n"
    )


def _screening(rows: list[dict[str, Any]]) -> str:
    """One row a variant, one column a size and dtype; the chosen ones are bold."""
    columns = list(dict.fromkeys((row["size"], row["dtype"]) for row in rows))
    found = {
        (row["size"], row["dtype"]): {entry["name"]: entry["tokens_per_s"] for entry in row["screening"]}
        for row in rows
    }  # fmt: skip
    names = dict.fromkeys(entry["name"] for row in rows for entry in row["screening"])
    chosen = {(row["size"], row["dtype"]): row["variant"] for row in rows}

    def cell(column: tuple[str, str], name: str) -> str:
        speed = found[column].get(name)
        text = f"{speed:,.0f}" if speed else ""
        return f"**{text}**" if chosen[column] == name and text else text

    return markdown(
        ["variant", *(f"{size} {dtype}" for size, dtype in columns)],
        ([name, *(cell(column, name) for column in columns)] for name in names),
    )
