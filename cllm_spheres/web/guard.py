"""Every request before any route: its Host, its Origin, its key; and every failure becomes JSON, and is counted.

A page in a browser may reach a server on 127.0.0.1 by a name of its own that it lets point there (DNS rebinding), or
simply send a form there. So the Host must be a name of ours, and an Origin one that was allowed.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import re
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cllm_spheres.errors import shown
from cllm_spheres.web.access_log import AccessLog
from cllm_spheres.web.metrics import Metrics
from cllm_spheres.web.refusals import Refused

MOST_HEADER_BYTES = 16 << 10
CLOSE = {"Connection": "close"}
OPEN_PATHS = ("/health",)  # without the key: who watches a service has none
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]+?)\.?)(?::\d*)?")
FAILURE = Refused(500, "The server failed; its own log says how.", code="internal_error")
CLIENT_LEFT = "499"  # nginx's number for it


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_unspecified(host: str) -> bool:
    """Whether that stands for all addresses of this machine."""
    return _is_address(host) and ipaddress.ip_address(host).is_unspecified


@dataclass(frozen=True)
class Rules:
    """Who may ask. `hosts` and `origins` in lower case."""

    hosts: frozenset[str]
    origins: frozenset[str] = frozenset()
    key: str | None = None
    any_address: bool = False  # Hosts that are numbers: no name can be made to point there

    @classmethod
    def of(cls, bound: str, hosts: Iterable[str] = (), origins: Iterable[str] = (), key: str | None = None) -> Rules:
        """Rules of a server that is bound to an address."""
        names = {bound, "localhost", *hosts}
        if is_loopback(bound):
            names |= {"127.0.0.1", "::1"}
        return cls(
            frozenset(_host_name(name) if name.startswith("[") else name.lower() for name in names - {""}),
            frozenset(origin.lower().rstrip("/") for origin in origins), key, _is_unspecified(bound),
        )  # fmt: skip

    def check(self, scope: Scope) -> None:
        """Raises Refused."""
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value)
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MOST_HEADER_BYTES:
            raise Refused(431, f"The headers have more than {MOST_HEADER_BYTES:,} bytes.", headers=CLOSE)
        if b"content-length" in headers and b"transfer-encoding" in headers:
            raise Refused(400, "Both Content-Length and Transfer-Encoding were sent: send one.", headers=CLOSE)
        host = b",".join(headers.get(b"host", [])).decode("latin-1")
        name = _host_name(host)
        if name not in self.hosts and not (self.any_address and _is_address(name)):
            raise Refused(403, f"The Host {shown(host)} is not served here: start with --allow-host.", code="host")
        for origin in headers.get(b"origin", []):
            if origin.decode("latin-1").lower() not in self.origins:
                message = f"Pages of {shown(origin.decode('latin-1'))} may not ask here: start with --allow-origin."
                raise Refused(403, message, code="origin")
        if self.key is None or scope["path"] in OPEN_PATHS or _is_preflight(scope, headers):
            return
        given = b",".join(headers.get(b"authorization", []))
        scheme, _, key = given.partition(b" ")
        if not (hmac.compare_digest(_digest(key.strip()), _digest(self.key.encode())) and scheme.lower() == b"bearer"):
            raise Refused(
                401, "The API key is missing or wrong: send the header Authorization: Bearer KEY.",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    def readable_by(self, scope: Scope) -> dict[str, str]:
        """The headers by which a browser lets an allowed page read an answer that no route has given."""
        origins = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
        if len(origins) != 1 or origins[0].lower() not in self.origins:
            return {}
        return {"Access-Control-Allow-Origin": origins[0], "Vary": "Origin"}


def _digest(key: bytes) -> bytes:
    """Of equal length for keys of any length, so that comparing takes one time."""
    return hashlib.sha256(key).digest()


def _is_preflight(scope: Scope, headers: dict[bytes, list[bytes]]) -> bool:
    """A browser's question before a request; it carries no key."""
    return scope["method"] == "OPTIONS" and b"origin" in headers and b"access-control-request-method" in headers


def _host_name(host: str) -> str:
    """A Host header without its port: "[::1]:8000" -> "::1"; "" for what is none."""
    found = _HOST.fullmatch(host.lower())
    return (found[1] or found[2]) if found else ""


class Guard:
    """The outermost application."""

    def __init__(
        self, app: ASGIApp, rules: Rules, metrics: Metrics, paths: Iterable[str], log: AccessLog | None = None
    ) -> None:
        self.app, self.rules, self.metrics, self.paths, self.log = app, rules, metrics, frozenset(paths), log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        began, status = time.monotonic(), CLIENT_LEFT
        state: dict[str, Any] = scope.setdefault("state", {})

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            try:
                self.rules.check(scope)
                await self.app(scope, receive, seen)
            except Refused as refused:
                await respond(refused, self.rules.readable_by(scope))(scope, receive, seen)
            except Exception:
                traceback.print_exc(file=sys.stderr)
                if status == CLIENT_LEFT:
                    await respond(FAILURE, self.rules.readable_by(scope))(scope, receive, seen)
        finally:
            path, seconds = self._path(scope["path"]), time.monotonic() - began
            self.metrics.requests.add(path, status)
            self.metrics.seconds.observe(seconds, path)
            if self.log:
                client, usage = scope["client"], state["answer"].usage if "answer" in state else None
                tokens = (usage["prompt_tokens"], usage["completion_tokens"]) if usage else None
                self.log.add(client[0] if client else "-", scope["method"], path, status, seconds, tokens)

    def _path(self, path: str) -> str:
        if path in self.paths:
            return path
        return "/v1/models/{id}" if path.startswith("/v1/models/") else "other"


class Json(Response):
    """A value as JSON in ASCII: half a surrogate pair, from a client or a file's name, has no bytes in UTF-8."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def respond(refused: Refused, more: Mapping[str, str] | None = None) -> Json:
    """A refusal as a response, with more headers. Where the body was not read, the connection cannot go on."""
    headers = {**refused.headers, **(more or {})}
    if refused.status in (408, 413):
        headers["Connection"] = "close"
    return Json(refused.body, refused.status, headers)
