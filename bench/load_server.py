"""A run -> a server in a process of its own, and what it holds while nobody asks."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from cllm_spheres.errors import RunFailed

IDLE_S = 90.0  # for all to have gone


@dataclass(frozen=True)
class Holding:
    """What a server has, while nobody asks."""

    server_bytes: int
    inference_bytes: int
    descriptors: int
    inference_descriptors: int
    threads: int
    tasks: int
    connections: int
    in_flight: int


class Server:
    """`cllm-spheres serve` in a process of its own."""

    def __init__(self, run: Path, slots: int, queue: int) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        words = ["serve", str(run), "--port", "0", "--slots", str(slots), "--queue", str(queue)]
        code = "from cllm_spheres_cli import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=self.errors, text=True,
            start_new_session=True, env={k: v for k, v in os.environ.items() if k != "CLLM_SPHERES_API_KEY"},
        )  # fmt: skip
        assert self.process.stdout
        lines = iter(self.process.stdout.readline, "")
        last = next((line for line in lines if line.startswith("Listening")), None)
        if last is None:
            raise RunFailed(f"The server did not start: {self.said()}")
        self.port = int(last.split()[2].rpartition(":")[2])

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace")

    async def gauges(self) -> dict[str, float]:
        """The numbers of /metrics that have no labels."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        page = (await reader.read()).decode()
        writer.close()
        pairs = (line.rsplit(" ", 1) for line in page.splitlines() if line.startswith("cllm_") and "{" not in line)
        return {name: float(value) for name, value in pairs}

    async def holding(self) -> Holding:
        """Once nothing is in flight and all have gone."""
        deadline = time.monotonic() + IDLE_S
        while True:
            gauges = await self.gauges()
            in_flight = int(gauges["cllm_running"] + gauges["cllm_queue_length"])
            if (not in_flight and gauges["cllm_connections"] == 1) or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.2)
        server = psutil.Process(self.process.pid)
        (child,) = server.children()
        return Holding(
            server.memory_info().rss, child.memory_info().rss, server.num_fds(), child.num_fds(),
            server.num_threads() + child.num_threads(), int(gauges["cllm_tasks"]), int(gauges["cllm_connections"]),
            in_flight,
        )  # fmt: skip

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
