"""`cllm-spheres cache`: what lies in the caches, and clearing them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cllm_spheres.doctor.cached import Cached

_KINDS = {  # as in Cached.kind -> what one of them is called
    "kernels": ("folder", " of compiled kernels"),
    "text": ("prepared text", ""),
    "unfinished": ("unfinished folder", ""),
    "keys": ("list", " of texts prepared so far"),
}


def cache(
    clear: Annotated[
        bool, typer.Option("--clear", help="Remove all that no process uses. It is made again when it is needed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
) -> None:
    """Show the compiled kernels and the prepared text that are kept for the next time, or remove them.

    A run whose text was prepared by train prepares it again on --resume, where the text itself is still there.
    """
    import json
    import time
    from dataclasses import asdict

    from cllm_spheres import caches
    from cllm_spheres.doctor import cached
    from cllm_spheres.errors import InputError
    from cllm_spheres.units import duration, size

    if clear:
        if as_json:
            raise InputError("--json lists what is there, and --clear removes it. Leave one of them out.")
        removed, left = cached.clear()
        freed = size(sum(one.size_bytes for one in removed))
        print(f"{freed} freed: {_counts(removed)}." if removed else "There was nothing to remove.")
        if left:
            print(f"Left, because it is in use or cannot be removed: {_counts(left)}.")
        return
    found = cached.contents()
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=1))
        return

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from cllm_spheres.watch.paint import clean

    if not found:
        print(f"There is nothing in {caches.wanted()}.")
        return
    for place in caches.places():
        print(clean(str(place)))  # a table would break a long path at the end of the line
        table = Table(box=None, pad_edge=False)
        for name in ("", "age", "size"):
            table.add_column(name, justify="right" if name else "left", no_wrap=True)
        table.add_column("", overflow="fold")
        for one in found:
            if Path(one.path).is_relative_to(place):
                about = ", ".join(filter(None, [Path(one.path).name, one.about, "in use" * one.in_use]))
                age = duration(max(0.0, time.time() - one.changed))
                table.add_row(one.kind, age, size(one.size_bytes), Text(clean(about)))
        Console().print(table)
    total = size(sum(one.size_bytes for one in found))
    print(f"{total}. Remove what no process uses: cllm-spheres cache --clear")


def _counts(found: list[Cached]) -> str:
    """[...] -> "2 folders of compiled kernels, 1 prepared text": how many of each kind."""
    from cllm_spheres.units import plural

    kinds = [one.kind for one in found]
    return ", ".join(plural(kinds.count(kind), what) + more for kind, (what, more) in _KINDS.items() if kind in kinds)
