"""A body -> an answer, over a connection that the bench holds in its hands: to read slowly, or to drop it.

asyncio's streams and nothing above: 200 clients of a library would take more of the cores than the server.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from dataclasses import dataclass
from typing import Any

WAIT_S = 120.0  # for anything; who waits longer has lost something
SMALL = 4096  # bytes of a slow reader's buffers
EVENT = b"data: "


@dataclass
class Answer:
    """What came back. `first_s`: until the first event of a stream, or the whole answer."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes
    first_s: float

    @property
    def text(self) -> str:
        """The text of the only choice, of a stream's pieces too."""
        if self.headers.get(b"content-type", b"").startswith(b"text/event-stream"):
            events = [line.removeprefix(EVENT) for line in self.body.split(b"\n\n") if line]
            assert events[-1] == b"[DONE]", events[-1]
            return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
        return json.loads(self.body)["choices"][0]["text"]

    def problem(self, allowed: tuple[int, ...]) -> str | None:
        """Why this is no answer that a client may get; None where it is one."""
        if self.status == 200:
            return None
        try:
            error = json.loads(self.body)["error"]
            well = error.keys() == {"message", "type", "param", "code"} and "Traceback" not in error["message"]
        except (ValueError, KeyError, TypeError):
            well = False
        return None if well and self.status in allowed else f"{self.status}: {self.body[:200]!r}"


class Client:
    """One connection, kept open between requests; opened anew where the server has closed it."""

    def __init__(self, port: int, pause_s: float = 0.0) -> None:
        """pause_s: wait so long before each event of a stream is read, with small buffers."""
        self.port, self.pause_s = port, pause_s
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.writer is None or self.reader is None or self.reader.at_eof():
            self.close()
            connection = socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)
            connection.setblocking(False)
            if self.pause_s:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
            limit = SMALL if self.pause_s else 1 << 16
            self.reader, self.writer = await asyncio.open_connection(sock=connection, limit=limit)
        assert self.reader and self.writer
        return self.reader, self.writer

    def close(self, abruptly: bool = False) -> None:
        if self.writer is not None:
            if abruptly:
                self.writer.transport.abort()
            self.writer.close()
        self.reader = self.writer = None

    async def send(self, body: bytes, path: str = "/v1/completions") -> None:
        _, writer = await self.open()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)

    async def ask(self, body: bytes, path: str = "/v1/completions") -> Answer:
        """The whole answer. A kept connection that the server closed just then is tried once more."""
        began, kept = time.perf_counter(), self.writer is not None
        try:
            async with asyncio.timeout(WAIT_S):
                await self.send(body, path)
                return await self._answer(began)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.close()
            if not kept:
                raise
            return await self.ask(body, path)

    async def _answer(self, began: float) -> Answer:
        assert self.reader
        head = await self.reader.readuntil(b"\r\n\r\n")
        status_line, *lines = head.split(b"\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines if line)}
        if b"content-length" in headers:
            body, first_s = await self.reader.readexactly(int(headers[b"content-length"])), time.perf_counter() - began
        else:
            body, first_s = b"", 0.0
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                if self.pause_s:
                    await asyncio.sleep(self.pause_s)
                body += (await self.reader.readexactly(size + 2))[:-2]
                first_s = first_s or time.perf_counter() - began
            await self.reader.readexactly(2)
        if headers.get(b"connection") == b"close":
            self.close()
        return Answer(int(status_line.split()[1]), headers, body, first_s)


def encoded(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()
