"""Options of a run -> all findings, one after the other: what the command `doctor` shows."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cllm_spheres.config import Config
from cllm_spheres.doctor import needs, system
from cllm_spheres.doctor.finding import WHERE_IT_FAILS, Finding, look
from cllm_spheres.limits import raised_files
from cllm_spheres.spheres.job import Job
from cllm_spheres.spheres.server import PACKET_BYTES
from cllm_spheres.spheres.serving import clean_environment

SILENT_S = 600.0  # a check inside may compile for a minute on a slow machine
CHILD = "cllm_spheres.doctor.inside"


def examine(
    config: Config, job: Job, run: Path, status: Callable[[str], None] = lambda text: None
) -> Iterator[Finding]:
    """The findings on this machine and on a run of this job in the folder `run`; needs.plan makes both of options.

    status: told what takes long.
    """
    yield look("platform", system.look_at_platform)
    yield look("cores", system.look_at_cores)
    yield look("memory", system.look_at_memory)
    yield look("CPU", system.look_at_cpu)
    yield look("shared memory", system.look_at_sharing)
    yield look("temporary files", needs.look_at_temporary_folder)
    yield look("kernel cache", needs.look_at_kernel_cache)
    yield look("text cache", needs.look_at_text_cache)
    yield look("run", lambda: needs.look_at_run(config, job))
    yield look("run's memory", lambda: needs.look_at_memory(job))
    yield look("address space", lambda: needs.look_at_address_space(job))
    yield look("open files", lambda: needs.look_at_files(job))
    yield look("processes", lambda: needs.look_at_tasks(job))
    yield look("run folder", lambda: needs.look_at_run_folder(run, job))
    yield from look_inside(job, status)


def look_inside(job: Job, status: Callable[[str], None]) -> Iterator[Finding]:
    """Findings on the kernels from a process of its own; how it ended is one too where it did not finish."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.ExitStack() as stack:
        stack.callback(ours.close)
        errors = stack.enter_context(tempfile.TemporaryFile())
        try:
            with raised_files():
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", CHILD, str(theirs.fileno()), str(os.getpid())],
                    pass_fds=[theirs.fileno()], env=clean_environment(), stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL, stderr=errors,
                )  # fmt: skip
        except OSError as error:
            yield Finding("kernels", "bad", f"No process can be started: {error.strerror}", "See the limits above.")
            return
        finally:
            theirs.close()
        stack.callback(process.wait)
        stack.callback(process.kill)
        with contextlib.suppress(OSError):  # it has ended already
            ours.send(json.dumps(job.to_dict()).encode())
        looking, finished = "kernels", False
        for message in _messages(ours):
            if "finding" in message:
                yield Finding(**message["finding"])
            looking, finished = message.get("looking", looking), message.get("finished", finished)
            status(message.get("status", ""))
        if finished:
            return
        yield Finding(looking, "bad", _end_of(process, errors), _advice(process.returncode))


def _messages(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """What the process says until it ends, or is silent for too long."""
    while select.select([connection], [], [], SILENT_S)[0]:
        try:
            data = connection.recv(PACKET_BYTES)
        except OSError:
            return
        if not data:
            return
        yield json.loads(data)


def _end_of(process: subprocess.Popen[bytes], errors: Any) -> str:
    """How the process ended, in words, with the last line it wrote."""
    try:
        code = process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return f"The process that runs the kernels said nothing for {SILENT_S:.0f} s."
    how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
    errors.seek(0)
    said = errors.read().decode(errors="replace").strip().splitlines()
    return f"The process that runs the kernels ended with {how}" + (f": {said[-1]}" if said else ".")


def _advice(code: int | None) -> str:
    if code == -signal.SIGILL:
        return "The CPU lacks an instruction that it claims to have. Try CLLM_SPHERES_GEMM=openblas and --dtype fp32."
    if code == -signal.SIGKILL:
        return "Often the machine ran out of memory: end other programs, or take a smaller --preset."
    return WHERE_IT_FAILS
