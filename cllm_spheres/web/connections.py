"""A connection of uvicorn's, bounded: in number, in the time to ask, and in the time to take what it asked for.

uvicorn gives a client all the time it likes to send its headers, and to read. Here a reader who leaves what was written
to it for too long is cut off, and with it its request, its slot and its buffer.

A client that has asked may end its side of the connection and read on. The end of the whole connection looks the same
until something is written: the kernel of a client that has left answers with a reset, and the next write fails. So
"100 Continue", which every client of HTTP/1.1 passes over, is written until the answer begins.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from cllm_spheres.web.access_log import AccessLog
from cllm_spheres.web.refusals import Refused, bad

MOST_CONNECTIONS = 1000
HEADER_BYTES = 16 << 10
MOST_CHUNKS = 4096  # of a body
KEEP_ALIVE_S = 10  # between an answer and the next request
ASK_S = 20.0  # for a request's line and headers, from when none is under way
TAKE_S = 60.0  # until a client has read all that was written to it
PROBE_S = 0.1  # from a client's end of sending to the first question whether it is still there; each pause is twice
LONGEST_PROBE_S = 10.0  # the one before, up to this


class Parser(h11.Connection):
    """h11's side of a server, which refuses a body in thousands of chunks: reading one byte costs as much as 64 KiB."""

    _num_chunks = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_chunks = 0
        elif isinstance(event, h11.Data):
            self._num_chunks += event.chunk_start
            if self._num_chunks > MOST_CHUNKS:
                raise h11.RemoteProtocolError(f"more than {MOST_CHUNKS:,} chunks")
        return event


class Connection(H11Protocol):
    """One client. Its refusals are logged here where they come before any request."""

    _asking_since: float | None = None
    _untaken_since: float | None = None
    _sends_no_more = False

    def __init__(self, *arguments: Any, log: AccessLog | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._log = log
        self.conn = Parser(h11.SERVER, HEADER_BYTES)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._asking_since = time.monotonic()
        if len(self.connections) > MOST_CONNECTIONS:
            full = Refused(503, f"{MOST_CONNECTIONS:,} clients are connected: try again later.", code="too_many")
            self._say_and_close(full)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays open though the client sends no more: where its whole request is here.

        HTTP/1.0 has no interim answers, so such a client counts as one that has left.
        """
        request = self.cycle
        if request is None or request.response_complete or request.more_body or self.scope["http_version"] == "1.0":
            return False
        self._sends_no_more = True
        self.loop.call_later(PROBE_S, self._probe, PROBE_S)
        return True

    def _probe(self, pause_s: float) -> None:
        """Write to a client that may have left, unless its answer has begun, which does the same."""
        if self.transport.is_closing():
            return
        if not self.cycle.response_started:
            self.transport.write(self.conn.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
        pause_s = min(2 * pause_s, LONGEST_PROBE_S)
        self.loop.call_later(pause_s, self._probe, pause_s)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._sends_no_more and self.cycle.response_complete:  # no request is left that was sent with it
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what is no HTTP, as JSON."""
        self._say_and_close(bad(msg, code="invalid_http"))

    def _say_and_close(self, refused: Refused) -> None:
        if self._log:
            self._log.add(self.client[0] if self.client else "-", "-", "-", str(refused.status), 0.0)
        body = json.dumps(refused.body).encode()
        head = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        try:
            events = (h11.Response(status_code=refused.status, headers=head), h11.Data(data=body), h11.EndOfMessage())
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
            self.transport.close()
        except h11.LocalProtocolError:  # in the middle of an answer: nothing can be said any more
            self.transport.abort()

    def overdue(self, now: float) -> bool:
        """Whether the client has had its time; asked about once a second."""
        if not self.transport.get_write_buffer_size():
            self._untaken_since = None
        elif self._untaken_since is None:
            self._untaken_since = now
        if self.cycle is not None and not self.cycle.response_complete:
            self._asking_since = None
        elif self._asking_since is None:
            self._asking_since = now
        asks_too_long = self._asking_since is not None and now - self._asking_since > ASK_S
        return asks_too_long or (self._untaken_since is not None and now - self._untaken_since > TAKE_S)


def sweep(connections: set[Any]) -> None:
    """Cut off whoever is overdue."""
    now = time.monotonic()
    for connection in list(connections):
        if connection.overdue(now):
            connection.transport.abort()
