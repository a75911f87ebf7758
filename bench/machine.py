"""This machine, this checkout and the command -> the lines every result begins with, and where results go."""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from cllm_spheres.errors import InputError, SpheresError
from cllm_spheres.machine import usable_cores

HERE = Path(__file__).resolve().parent


@contextlib.contextmanager
def told() -> Iterator[None]:
    """A script's errors of ours are said without a traceback, and end it with their exit code."""
    try:
        yield
    except SpheresError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def cpu_name() -> str:
    """As the kernel calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """The checkout's commit, with a + where files differ from it; of an installed package its version."""
    try:
        found = subprocess.run(
            ["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
        if in_checkout():
            return found.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return f"version {installed('cllm-spheres')}"


def installed(package: str) -> str:
    """The version of an installed package, or "none"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def in_checkout() -> bool:
    """Whether this package lies in the project's own tree."""
    return (HERE.parent / "pyproject.toml").is_file() and (HERE.parent / "cllm_spheres").is_dir()


def results_folder(out: Path | None) -> Path:
    """`out`, or bench/results of the checkout, or from an installed package the current folder; it is made.

    InputError where it cannot be written.
    """
    folder = out or (HERE / "results" if in_checkout() else Path.cwd())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written: {error.strerror}.") from None
    return folder


def facts(command: str) -> dict[str, Any]:
    """What a result depends on besides its code."""
    return {
        "machine": cpu_name(), "cores": len(usable_cores()), "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}", "python": platform.python_version(),
        "commit": commit(), "command": command, "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }  # fmt: skip


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest, largest, and all in their order."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": list(values)}


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; every column but the first stands to the right."""
    head = list(head)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_results(folder: Path, name: str, result: dict[str, Any], text: str) -> tuple[Path, Path]:
    """name.json and name.md."""
    paths = folder / f"{name}.json", folder / f"{name}.md"
    paths[0].write_text(json.dumps(result, indent=1) + "\n")
    paths[1].write_text(text)
    return paths
