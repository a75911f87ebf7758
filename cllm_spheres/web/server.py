"""Runs, an address and limits -> a server that runs until a signal: `serve`, in the main thread."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import psutil
import uvicorn

from cllm_spheres.errors import InputError, Interrupted
from cllm_spheres.limits import raised_files
from cllm_spheres.web.access_log import AccessLog
from cllm_spheres.web.app import make_app
from cllm_spheres.web.connections import KEEP_ALIVE_S, Connection, sweep
from cllm_spheres.web.engine import Engine
from cllm_spheres.web.guard import Rules, is_loopback
from cllm_spheres.web.link import KEY_VARIABLE, Setup
from cllm_spheres.web.metrics import Metrics
from cllm_spheres.web.requests import Limits

GRACE_S = 5  # for requests in flight, after a signal
TOLD_S = 2  # more, for those who must be told that it is over
SAME_SIGNAL_S = 0.2  # some senders signal a process and then its group: what comes this soon after is the same wish
STDOUT = 1
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Settings:
    """Where to listen, who may ask for what, and how many may wait."""

    setup: Setup
    host: str = "127.0.0.1"
    port: int = 8000
    queue: int = 256
    key: str | None = None
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    log_requests: bool = False  # a line each on standard output

    def validate(self) -> None:
        """InputError, one line for each setting that cannot work."""
        wrong = []
        if not 0 <= self.port <= 65535:
            wrong.append(f"--port {self.port}: give 1 to 65535, or 0 for any that is free.")
        if self.key is None and not is_loopback(self.host):
            wrong.append(
                f"--host {self.host} can be reached from other machines: that needs an API key. Write one into a file"
                f" and give --api-key-file FILE, or set {KEY_VARIABLE}."
            )
        for name, value in (
            ("--slots", self.setup.slots),
            ("--queue", self.queue),
            ("--max-tokens", self.limits.tokens),
        ):
            if value < 1:
                wrong.append(f"{name} {value}: give 1 or more.")
        if not self.limits.seconds > 0:
            wrong.append(f"--timeout {self.limits.seconds:g}: give seconds above 0.")
        if wrong:
            raise InputError("\n".join(wrong))


class Stop:
    """Signals -> a wish to stop: `number` is the first that came. A second one means at once."""

    def __init__(self, at_once: Callable[[], None]) -> None:
        self.number, self.wished = 0, asyncio.Event()
        self._at_once, self._last = at_once, 0.0
        for number in STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._came, number)

    def _came(self, number: int) -> None:
        now = time.monotonic()
        if not self.number:
            self.number = number
            self.wished.set()
        elif now - self._last >= SAME_SIGNAL_S:
            self._at_once()
        self._last = now

    def error(self, what: str) -> Interrupted:
        return Interrupted(f"Stopped by {signal.Signals(self.number).name}. {what}", self.number)


class _Server(uvicorn.Server):
    """uvicorn's server, without its signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. InputError where the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"--host {host} is no address of this machine: {error.strerror}.") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _cannot_bind(host, port, error) from None
    return bound


def _cannot_bind(host: str, port: int, error: OSError) -> InputError:
    if error.errno == errno.EADDRINUSE:
        next_port = f"--port {port + 1}, or " if port < 65535 else ""
        return InputError(
            f"Port {port} of {host} is in use{_user_of(port)}. Give another one: {next_port}--port 0 for any."
        )
    if error.errno == errno.EACCES:
        return InputError(f"Port {port} may not be used without rights: give one above 1023, such as --port 8000.")
    return InputError(f"Cannot listen on port {port} of {host}: {error.strerror}.")


def _user_of(port: int) -> str:
    """Who listens there, where the system says."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""


def serve(settings: Settings, say: Callable[[str], None]) -> None:
    """Serve until a signal. Raises Interrupted then; InputError where it cannot begin."""
    settings.validate()
    with bind(settings.host, settings.port) as bound, raised_files(), contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(AccessLog(STDOUT))) if settings.log_requests else None
        asyncio.run(_serve(settings, bound, say, log))


async def _serve(settings: Settings, bound: socket.socket, say: Callable[[str], None], log: AccessLog | None) -> None:
    metrics = Metrics()
    engine = Engine(settings.setup, metrics, settings.queue)
    rules = Rules.of(settings.host, settings.allow_hosts, settings.allow_origins, settings.key)
    app = make_app(engine, metrics, rules, settings.limits, log)
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what a client does wrong is answered, not logged
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)

    async def every_second() -> None:
        sweep(server.server_state.connections)
        engine.watch()

    server = _Server(
        uvicorn.Config(
            app, http=partial(Connection, log=log),  # type: ignore[arg-type]
            ws="none", lifespan="off", log_config=None, access_log=False, proxy_headers=False,
            server_header=False, timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=GRACE_S + TOLD_S,
            callback_notify=every_second, timeout_notify=1,
        )
    )  # fmt: skip

    def at_once() -> None:
        server.force_exit = True

    metrics.show("cllm_connections", "Clients that are connected.", lambda: len(server.server_state.connections))
    metrics.show("cllm_tasks", "Tasks of the event loop.", lambda: len(asyncio.all_tasks()))
    stop = Stop(at_once)
    wished = asyncio.create_task(stop.wished.wait())
    try:
        say(f"Loading {', '.join(str(run) for run in settings.setup.runs.values())} ...")
        starting = asyncio.create_task(engine.start())
        await asyncio.wait((starting, wished), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            raise stop.error("Nothing was served yet.")
        await starting
        serving = asyncio.create_task(server.serve([bound]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.01)
        if not serving.done():
            _announce(settings, bound, engine, say)
        assert engine.supervisor
        await asyncio.wait((serving, wished, engine.supervisor), return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        asyncio.get_running_loop().call_later(GRACE_S, engine.refuse_all)
        left = len(server.server_state.tasks)
        began = time.monotonic()
        try:
            await serving
        except OSError as error:  # another program took the port meanwhile
            raise _cannot_bind(settings.host, settings.port, error) from None
        if not stop.number:
            await engine.supervisor  # raises what it ended with
        quick = time.monotonic() - began < GRACE_S and not server.force_exit
        raise stop.error(f"{left} requests were in flight{' and are finished' if left and quick else ''}.")
    finally:
        wished.cancel()
        await engine.close()


def _announce(settings: Settings, bound: socket.socket, engine: Engine, say: Callable[[str], None]) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    say(f"Models: {', '.join(engine.models)}; {settings.setup.slots} texts at once of each, {settings.queue} may wait.")
    if not is_loopback(settings.host) and not settings.allow_hosts:
        say("Requests must name this server by its address or as localhost: --allow-host NAME adds another name.")
    say(f"Listening on http://{host}:{bound.getsockname()[1]} (Ctrl+C stops)")
