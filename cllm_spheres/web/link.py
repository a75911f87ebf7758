"""Runs to serve -> the process that writes, and lines of JSON to and from it: the parent's side of `inference.py`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from cllm_spheres.errors import InputError, RunFailed
from cllm_spheres.spheres.server import die_with
from cllm_spheres.spheres.serving import clean_environment

KEY_VARIABLE = "CLLM_SPHERES_API_KEY"
LINE_BYTES = 256 << 20  # a step in which every text shows its whole prompt's log-probabilities
# A process that loads a model hangs where it computes for less than a second within STILL_S. One that compiles on a
# slow and busy machine may take many minutes, but not LOAD_S.
STILL_S, LOAD_S = 120.0, 1800.0
LOOK_S = 1.0
END_S = 2.0  # for a process that was told to end, and once more for one that was killed


@dataclass(frozen=True)
class Setup:
    """What is served, and how it is computed."""

    runs: dict[str, Path]  # by the models' names
    checkpoint: str | None = None
    slots: int = 16  # texts written at once, of each model
    dtype: str = "fp32"
    threads: int | None = None


class Link:
    """A process of inference. Make it with `start`; `read` gives None at its end."""

    def __init__(
        self, setup: Setup, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.setup, self.process, self._reader, self._writer = setup, process, reader, writer

    @classmethod
    async def start(cls, setup: Setup) -> Link:
        """Start it, from the main thread: the kernel ends the process when the thread that started it ends."""
        ours, theirs = socket.socketpair()
        environment = clean_environment()
        environment.pop(KEY_VARIABLE, None)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cllm_spheres.web.inference", str(theirs.fileno()), str(os.getpid())],
            preexec_fn=partial(die_with, os.getpid()), pass_fds=[theirs.fileno()], env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours, limit=LINE_BYTES)
        link = cls(setup, process, reader, writer)
        runs = [(str(run), setup.checkpoint) for run in setup.runs.values()]
        link.say({"runs": runs, "slots": setup.slots, "dtype": setup.dtype, "threads": setup.threads})
        return link

    async def loaded(self) -> list[dict[str, Any]]:
        """Wait until all models are loaded: what the process says of each.

        InputError where a model cannot be loaded, RunFailed where the process ends, or hangs and is ended.
        """
        abouts: list[dict[str, Any]] = []
        for run in self.setup.runs.values():
            answer = await self._read_loaded(run)
            if not isinstance(answer, dict) or "loaded" not in answer:
                code = await self.end()
                if isinstance(answer, dict) and "failed" in answer:
                    raise InputError(answer["failed"])
                raise RunFailed(f"The process of inference ended while it loaded {run}: {how_ended(code)}.")
            abouts.append(answer["loaded"])
        return abouts

    async def _read_loaded(self, run: Path) -> Any:
        """The next message; RunFailed where the process stands still, or takes too long, and is ended."""
        reading = asyncio.ensure_future(self.read())
        began = moved = time.monotonic()
        computed_s = self.computed_s()
        try:
            while not reading.done():
                await asyncio.wait((reading,), timeout=LOOK_S)
                now = time.monotonic()
                if self.computed_s() - computed_s >= 1:
                    computed_s, moved = self.computed_s(), now
                if not reading.done() and (now - moved > STILL_S or now - began > LOAD_S):
                    self.process.kill()
                    await self.end()
                    did = (
                        f"took {now - began:.0f} s" if now - began > LOAD_S else f"did nothing for {now - moved:.0f} s"
                    )
                    raise RunFailed(
                        f"The process of inference {did} while it loaded {run}, and was ended. Look whether its disk"
                        " answers, and try again: kernels that are compiled already are kept."
                    )
            return reading.result()
        finally:
            reading.cancel()

    def computed_s(self) -> float:
        """Seconds of CPU that the process has had, and those that it has started."""
        total = 0.0
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.process.pid)
            for each in (process, *process.children(recursive=True)):
                total += sum(each.cpu_times())
        return total

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def say(self, message: dict[str, Any]) -> None:
        """Queue a line. What a process does not take is bounded by its slots; what is said to a dead one is lost."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def read(self) -> Any:
        """The next message, or None where the process has ended."""
        try:
            line = await self._reader.readline()
        except (ConnectionError, ValueError):
            return None
        return json.loads(line) if line.endswith(b"\n") else None

    async def end(self) -> int | None:
        """Close our end, wait for the process, kill it where it does not go. Its exit code, or None where not even
        that ends it, as when it waits for a disk that does not answer: it is left to the system then.
        """
        self._writer.close()
        try:
            await self._ended()
        finally:
            if self.alive:
                self.process.kill()
        await self._ended()
        return self.process.poll()

    async def _ended(self) -> None:
        """Wait for the process's end, at most END_S."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                while self.alive:
                    await asyncio.sleep(0.01)


def how_ended(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "it hangs in the system, where not even SIGKILL ends it"
    if code < 0:
        name = signal.Signals(-code).name
        return f"by {name}" + (", often because memory ran out" if name == "SIGKILL" else "")
    return f"with exit code {code}"
