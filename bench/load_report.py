"""What a load found -> the tables of bench/results/load.md, and whether it was good."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from cllm_spheres_bench.machine import facts, results_folder, write_results

from cllm_spheres.units import size

if TYPE_CHECKING:
    from cllm_spheres_bench.load import Found, Options
    from cllm_spheres_bench.load_server import Holding

GROWTH = 0.10  # of memory, over what warming up took: allocators do not give all back
SHOWN = 10  # of what was wrong
NAMES = {
    "server_bytes": "memory of the web process", "inference_bytes": "memory of the process of inference",
    "descriptors": "its descriptors", "inference_descriptors": "the other's descriptors",
    "threads": "threads of both", "tasks": "tasks of the event loop", "connections": "connections (the one that asks)",
    "in_flight": "texts in slots or in the queue",
}  # fmt: skip


def publish(options: Options, found: Found, before: Holding, after: Holding) -> int:
    """Print and write; 1 where anything was wrong."""
    grown = leaks(asdict(before), asdict(after))
    wrong = [*found.wrong, *(f"It grew: {name}" for name in grown)]
    about = facts(options.command)
    where = f"{about['cores']} cores of {about['machine']}, commit {about['commit']}, {about['date']}"
    lines = [*_speed(options, found), "", *_holdings(before, after), "", *_verdict(options, found, wrong)]
    head = f"# A server under load\n\n`{about['command']}`, {where}. Clients and server share the cores.\n\n"
    data = {
        "calm": _figures(found.calm), "disturbed": _figures(found), "alone_s": found.alone,
        "statuses": dict(found.statuses), "others": dict(found.others),
        "before": asdict(before), "after": asdict(after), "wrong": wrong,
    }  # fmt: skip
    text = "\n".join(lines) + "\n"
    write_results(results_folder(options.out), "load", about | _rounded(data), head + text)
    print("\n" + text)
    return 1 if wrong else 0


def leaks(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """The names of what there is more of: memory by a tenth, anything else by one."""
    return [name for name, was in before.items() if after[name] > was * (1 + GROWTH * name.endswith("_bytes"))]


def _speed(options: Options, found: Found) -> list[str]:
    assert found.calm
    rows, said = [], []
    for who, one in (("good clients only", found.calm), ("bad ones beside", found)):
        count = sum(map(len, one.latencies.values()))
        said.append(
            f"{who.capitalize()}: {count:,} requests in {one.seconds:.1f} s, **{count / one.seconds:.0f} requests/s,"
            f" {one.tokens / one.seconds:,.0f} tokens/s**; {one.again} were asked again after 429."
        )
        rows += [
            (f"a whole answer, {who}", one.latencies["whole"]),
            (f"a whole stream, {who}", one.latencies["stream"]),
        ]
        rows.append((f"the first piece of a stream, {who}", one.first))
    rows.append(("a whole answer, one client alone", found.alone))
    table = [f"| {name} | {len(values)} | {_percentiles(values)} |" for name, values in rows if values]
    return [
        f"{options.clients} clients at once, texts of {options.tokens} tokens or fewer, {options.slots} slots:"
        " most of a latency is the wait for a slot.", "", *(f"- {line}" for line in said), "",
        "The bad ones: " + ", ".join(f"{count} {what}" for what, count in sorted(found.others.items())) + ".", "",
        "| seconds until | number | p50 | p95 | p99 | longest |", "|---|--:|--:|--:|--:|--:|", *table,
    ]  # fmt: skip


def _percentiles(values: list[float]) -> str:
    return " | ".join(f"{value:.3f}" for value in (*np.percentile(values, [50, 95, 99]), max(values)))


def _holdings(before: Holding, after: Holding) -> list[str]:
    lines = ["| what the server has | before | after |", "|---|--:|--:|"]
    for name, title in NAMES.items():
        shown: list[Any] = [getattr(side, name) for side in (before, after)]
        if name.endswith("_bytes"):
            shown = [size(value) for value in shown]
        lines.append(f"| {title} | {shown[0]} | {shown[1]} |")
    return lines


def _figures(found: Found | None) -> dict[str, Any]:
    assert found
    return {
        "latencies_s": found.latencies, "first_s": found.first, "seconds": found.seconds, "tokens": found.tokens,
        "asked_again": found.again,
    }  # fmt: skip


def _verdict(options: Options, found: Found, wrong: list[str]) -> list[str]:
    statuses = ", ".join(f"{count:,} x {status}" for status, count in sorted(found.statuses.items()))
    lines = [f"{options.bodies:,} bodies made wrong at random: {statuses}."] if options.bodies else []
    if not wrong:
        return [*lines, "Every good request got its text, the one that a Writer alone writes; nothing leaked."]
    more = [f"... and {len(wrong) - SHOWN} more"] * (len(wrong) > SHOWN)
    return [*lines, f"**{len(wrong)} things were wrong:**", *(f"- {line}" for line in [*wrong[:SHOWN], *more])]


def _rounded(value: Any) -> Any:
    """Floats with the digits that mean something."""
    if isinstance(value, dict):
        return {str(key): _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value
