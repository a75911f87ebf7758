"""What the sides of a size wrote -> tables: tokens a second, the share of what memory gives, and texts at once."""

from __future__ import annotations

from typing import Any

from cllm_spheres_bench.machine import markdown

OURS, LLAMA, TORCH, MEMORY = "cllm-spheres", "llama.cpp", "PyTorch without a cache", "memory"


def report(result: dict[str, Any]) -> str:
    """The document of a result."""
    known, versions = result["facts"], result["versions"]
    lines = [
        "# Writing text, beside llama.cpp and PyTorch",
        "",
        f"{known['machine']}, {known['cores']} cores, commit {known['commit']}, {known['date']}."
        f" PyTorch {versions['torch']}. `{known['command']}`",
        "",
        "Tokens a second of one text, median and range of turns in turn. Memory: the median of reading a buffer of the"
        " size of the weights by as many threads, tokens a second where each needs all weights once, and the share of"
        " that which a side reaches. Small models stay in the caches, which are faster than memory.",
        "",
    ]
    head = ["size, dtype, threads", "side", "tokens/s", "range", "weights read", "of memory's speed"]
    lines.append(markdown(head, _rows(result["sides"])))
    lines += ["Texts written at once, tokens a second of all of them:", ""]
    counts = sorted({side["texts"] for side in result["sides"] if side["name"] == OURS})
    lines.append(
        markdown(["size, dtype, threads", *(str(count) for count in counts)], _batched(result["sides"], counts))
    )
    return "\n".join(lines)


def _key(side: dict[str, Any]) -> tuple[str, str, int]:
    return side["size"], side["dtype"], side["threads"]


def _name(key: tuple[str, str, int]) -> str:
    return f"{key[0]}, {key[1]}, {key[2]}"


def _rows(sides: list[dict[str, Any]]) -> list[list[str]]:
    memory = {_key(side): side["per_s"]["median"] for side in sides if side["name"] == MEMORY}
    weights = {_key(side): side["weight_bytes"] for side in sides if side["name"] == MEMORY}
    rows = []
    for side in sorted(sides, key=lambda side: (side["size"], side["threads"], side["dtype"] == "bf16")):
        if side["texts"] != 1:
            continue
        key, speed = _key(side), side["per_s"]
        if side["name"] == MEMORY:
            possible = memory[key] / weights[key]
            rows.append([_name(key), MEMORY, f"{possible:,.0f}", "", f"{memory[key] / 1e9:.1f} GB/s", "100 %"])
            continue
        share, read = "", ""
        if side["name"] != TORCH:
            read = f"{speed['median'] * weights[key] / 1e9:.1f} GB/s"
            share = f"{speed['median'] * weights[key] / memory[key]:.0%}".replace("%", " %")
        low_high = f"{speed['min']:,.0f} to {speed['max']:,.0f}"
        rows.append([_name(key), side["name"], f"{speed['median']:,.0f}", low_high, read, share])
    return rows


def _batched(sides: list[dict[str, Any]], counts: list[int]) -> list[list[str]]:
    ours: dict[tuple[str, str, int], dict[int, float]] = {}
    for side in sides:
        if side["name"] == OURS:
            ours.setdefault(_key(side), {})[side["texts"]] = side["per_s"]["median"]
    return [[_name(key), *(f"{found[count]:,.0f}" for count in counts)] for key, found in ours.items()]
