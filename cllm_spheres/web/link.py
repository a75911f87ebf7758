"""Runs to serve -> the process that writes, and lines of JSON to and from it: the parent's side of `inference.py`."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cllm_spheres.spheres.server import die_with
from cllm_spheres.spheres.serving import clean_environment

KEY_VARIABLE = "CLLM_SPHERES_API_KEY"
LINE_BYTES = 256 << 20  # a step in which every text shows its whole prompt's log-probabilities
END_S = 2.0  # for a process that was told to end


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
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.process, self._reader, self._writer = process, reader, writer

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
        link = cls(process, reader, writer)
        runs = [(str(run), setup.checkpoint) for run in setup.runs.values()]
        link.say({"runs": runs, "slots": setup.slots, "dtype": setup.dtype, "threads": setup.threads})
        return link

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def say(self, message: dict[str, Any]) -> None:
        """Queue a line. What a process does not read is bounded by its slots; what is said to a dead one is lost."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def read(self) -> Any:
        """The next message, or None where the process has ended."""
        try:
            line = await self._reader.readline()
        except (ConnectionError, ValueError):
            return None
        return json.loads(line) if line.endswith(b"\n") else None

    async def end(self) -> int:
        """Close our end, wait for the process, kill it where it does not go; its exit code."""
        self._writer.close()
        try:
            async with asyncio.timeout(END_S):
                while self.alive:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            pass
        finally:
            if self.alive:
                self.process.kill()
            code = self.process.wait()
        return code
