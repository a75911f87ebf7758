"""Processes of a benchmark: they end with it, their memory is counted together, and all end at once.

    python -m cllm_spheres_bench.children PARENT_PID train --preset tiny ...

runs the command line itself in a process that ends with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends; call it from the main thread."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


@contextlib.contextmanager
def child(module: str, *arguments: str, errors: Path, environment: dict[str, str]) -> Iterator[psutil.Popen]:
    """A Python module as a process in a session of its own, so that Ctrl+C reaches only us; ended with its tree."""
    with errors.open("wb") as stderr:
        process = psutil.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, env={**os.environ, **environment},
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        end_tree(process)


def tree(process: psutil.Process) -> list[psutil.Process]:
    """A process and all below it, parents first; empty when it has ended."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def end_tree(process: psutil.Process, timeout_s: float = 10.0) -> None:
    """End a process and all below it without asking, and wait for it: there is nothing to save.

    Parents first, so that none has the time to replace a child.
    """
    processes = tree(process)
    for member in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    if alive:
        raise RuntimeError(f"processes {[member.pid for member in alive]} did not end within {timeout_s:.0f} s")


def pss_bytes(process: psutil.Process) -> dict[str, int]:
    """The number and module of a process -> proportional set size, of a process and all below it.

    A page shared by n processes counts 1/n in each.
    """
    return {f"{member.pid} {_module(member)}": _pss_of(member.pid) for member in tree(process)}


def _module(process: psutil.Process) -> str:
    """The module or script that a Python process runs, the title that it shows, else its program."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return ""
    script = words[words.index("-m") + 1] if "-m" in words[:-1] else next(
        (word for word in words[1:] if word.endswith(".py")), words[0] if words else ""
    )  # fmt: skip
    return Path(script).name


def _pss_of(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # it has just ended
    return 0


def main() -> None:
    """The command line, in a process that ends with its parent."""
    from cllm_spheres_cli import main as command

    end_with(int(sys.argv[1]))
    sys.argv = ["cllm-spheres", *sys.argv[2:]]
    command()


if __name__ == "__main__":
    main()
