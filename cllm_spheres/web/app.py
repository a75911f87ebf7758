"""An engine, rules and limits -> the application: the routes, and what each answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from cllm_spheres.errors import nearest
from cllm_spheres.units import size
from cllm_spheres.web.access_log import AccessLog
from cllm_spheres.web.answers import Answer, sent_event
from cllm_spheres.web.engine import Engine, Request
from cllm_spheres.web.fields import read_json
from cllm_spheres.web.guard import CLOSE, FAILURE, Guard, Json, Rules, respond
from cllm_spheres.web.metrics import Metrics
from cllm_spheres.web.refusals import Refused
from cllm_spheres.web.requests import Limits, Order, chat, completion, no_model

MOST_EVENTS = 256  # made into JSON at once: a backlog of thousands would hold up all other clients
BODY_S = 30.0  # for a request's body to come in
BODIES_BYTES = 64 << 20  # of all bodies that are coming in
PATHS = ("/v1/models", "/v1/models/{id}", "/v1/completions", "/v1/chat/completions", "/health", "/metrics")
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Parser = Callable[[dict[str, Any], tuple[str, ...], Limits], Order]


def make_app(engine: Engine, metrics: Metrics, rules: Rules, limits: Limits, log: AccessLog | None = None) -> ASGIApp:
    """The ASGI application, guard and all."""

    async def models(request: HttpRequest) -> Response:
        return Json({"object": "list", "data": [_about(engine, name) for name in engine.models]})

    async def model(request: HttpRequest) -> Response:
        name = unquote(request.path_params["id"])
        if name not in engine.models:
            raise no_model(name, tuple(engine.models))
        return Json(_about(engine, name))

    async def health(request: HttpRequest) -> Response:
        inference = {"alive": engine.alive, "restarts": engine.restarts, "last_end": engine.last_end or None}
        found = {
            "status": "ok" if engine.alive else "down", "inference": inference, "models": list(engine.models),
            "waiting": engine.waiting, "running": engine.running,
        }  # fmt: skip
        return Json(found, 200 if engine.alive else 503)

    async def show_metrics(request: HttpRequest) -> Response:
        return PlainTextResponse(metrics.text(), media_type=METRICS_TYPE)

    bodies = Bodies()

    def write(parse: Parser) -> Any:
        async def endpoint(request: HttpRequest) -> Response:
            try:
                body = await bodies.read(request, limits)
            except ClientDisconnect:
                return Nothing()
            return Written(engine, parse(read_json(body), tuple(engine.models), limits), limits.seconds)

        return endpoint

    routes = [
        Route("/v1/models", models), Route("/v1/models/{id:path}", model), Route("/health", health),
        Route("/metrics", show_metrics),
        Route("/v1/completions", write(completion), methods=["POST"]),
        Route("/v1/chat/completions", write(chat), methods=["POST"]),
    ]  # fmt: skip
    app: ASGIApp = Starlette(routes=routes, exception_handlers=_HANDLERS)
    app.router.redirect_slashes = False  # type: ignore[attr-defined]
    if rules.origins:
        app = CORSMiddleware(
            app, allow_origins=sorted(rules.origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return Guard(app, rules, metrics, PATHS, log)


def _about(engine: Engine, name: str) -> dict[str, Any]:
    model = engine.models[name]
    return {
        "id": name, "object": "model", "created": model.since, "owned_by": "cllm-spheres",
        "max_model_len": model.block_size,
    }  # fmt: skip


async def _refused(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return respond(error)


async def _no_route(request: HttpRequest, error: Exception) -> Response:
    """404 and 405 of the router, in OpenAI's form."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{request.method} is not possible here: {allowed} is."
        return respond(Refused(405, message, code="method_not_allowed", headers={"Allow": allowed}))
    message = f"There is nothing at this path: {nearest(request.url.path[:80], PATHS)}"
    return respond(Refused(404, message, code="not_found"))


async def _failed(request: HttpRequest, error: Exception) -> Response:
    """A mistake of ours; the guard prints it."""
    return respond(FAILURE)


_HANDLERS: dict[Any, Any] = {HTTPException: _no_route, Refused: _refused, Exception: _failed}


class Nothing(Response):
    """For a client that has left before it had asked."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pass


class Bodies:
    """The bodies that come in, bounded together: a thousand clients could send a gigabyte before one is judged."""

    def __init__(self) -> None:
        self._held_bytes = 0

    async def read(self, request: HttpRequest, limits: Limits) -> bytes:
        """The whole body. Refused where it is too long, too slow, or one too many."""
        too_long = Refused(413, f"The body is larger than {limits.body_bytes:,} bytes.", code="body_too_large")
        length = request.headers.get("content-length", "0")
        if int(length) > limits.body_bytes:  # the protocol lets nothing but digits through
            raise too_long
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                async for chunk in request.stream():
                    body += chunk
                    self._held_bytes += len(chunk)
                    if len(body) > limits.body_bytes:
                        raise too_long
                    if self._held_bytes > BODIES_BYTES:
                        message = f"More than {size(BODIES_BYTES)} of requests are coming in: try again in a moment."
                        raise Refused(503, message, code="too_many_bodies", headers={"Retry-After": "1"} | CLOSE)
        except TimeoutError:
            raise Refused(408, f"The body did not come within {BODY_S:g} s.", code="timeout") from None
        finally:
            self._held_bytes -= len(body)
        return bytes(body)


class Written(Response):
    """An order's texts as a response, whole or as a stream; cancelled as soon as the client has left."""

    def __init__(self, engine: Engine, order: Order, seconds: float) -> None:
        self.engine, self.order, self.seconds = engine, order, seconds
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, answer = self.engine.submit(self.order), Answer(self.order)
        scope["state"]["answer"] = answer  # what it has cost is logged when it has ended, however that was
        writing = asyncio.ensure_future(self._write(request, answer, scope, receive, send))
        leaving = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait((writing, leaving), return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                await writing
            else:
                self.engine.metrics.cancelled.add()
        finally:
            self.engine.cancel(request)  # where texts are left
            for task in (writing, leaving):
                task.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)

    async def _write(self, request: Request, answer: Answer, scope: Scope, receive: Receive, send: Send) -> None:
        if self.order.stream:
            await self._stream(request, answer, send)
            return
        async with contextlib.aclosing(self._events(request)) as batches:
            async for events in batches:
                for index, event in events:
                    answer.take(index, event, keep=True)
                if answer.complete:
                    break
        await Json(answer.whole())(scope, receive, send)

    async def _stream(self, request: Request, answer: Answer, send: Send) -> None:
        """Begin once the first text has, so that what is refused before still gets its status."""
        begun = False
        try:
            async with contextlib.aclosing(self._events(request)) as batches:
                async for events in batches:
                    if not begun:
                        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
                        begun = True
                    pieces = [answer.take(index, event, keep=False) for index, event in events]
                    data = b"".join(answer.chunk([piece]) for piece in pieces if piece)
                    if answer.complete:
                        await send({"type": "http.response.body", "body": data + answer.end()})
                        return
                    if data:
                        await send({"type": "http.response.body", "body": data, "more_body": True})
        except Refused as refused:
            if not begun:
                raise
            await send({"type": "http.response.body", "body": sent_event(refused.body)})

    async def _events(self, request: Request) -> AsyncGenerator[list[tuple[int, dict[str, Any]]], None]:
        """What happened, up to MOST_EVENTS at a time. Raises Refused where a text is refused, or time is up."""
        deadline = asyncio.get_running_loop().time() + self.seconds
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    events = [await request.events.get()]
            except TimeoutError:
                message = f"The text was not finished within {self.seconds:g} s, the wait in the queue included."
                raise Refused(504, message, code="timeout") from None
            while len(events) < MOST_EVENTS and not request.events.empty():
                events.append(request.events.get_nowait())
            for _, event in events:
                if "refused" in event:
                    param = ("messages" if self.order.chat else "prompt") if event["status"] == 400 else None
                    raise Refused(event["status"], event["refused"], param=param, code=event.get("code"))
            yield events


_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]  # fmt: skip


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
