"""The parts of the server by themselves: bodies, metrics, connections, answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from types import SimpleNamespace
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_spheres.inference.options import Options
from cllm_spheres.web import access_log, connections
from cllm_spheres.web import app as app_module
from cllm_spheres.web.answers import Answer
from cllm_spheres.web.connections import ASK_S, TAKE_S, Connection
from cllm_spheres.web.fields import read_json
from cllm_spheres.web.metrics import SECONDS, Counter, Histogram, Metrics
from cllm_spheres.web.refusals import Refused
from cllm_spheres.web.requests import Limits, chat, completion

NAMES = st.sampled_from([
    "model", "prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed", "logprobs",
    "echo", "stream", "stream_options", "tools", "user", "best_of", "min_p", "role", "content", "x",
])  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.integers(0, 3), st.floats(), st.text(max_size=9),
    st.sampled_from(["m", "user", "assistant"]),
)  # fmt: skip
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(NAMES, v, max_size=3), max_leaves=8)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(NAMES, VALUES), st.sampled_from([completion, chat]))
def test_any_body_becomes_an_order_that_a_writer_takes_or_is_refused(body, parse):
    try:
        order = parse({"model": "m"} | body, ("m",), Limits())
    except Refused as refused:
        assert 400 <= refused.status < 500 and refused.message and len(json.dumps(refused.body)) < 2000
        return
    assert 1 <= len(order.texts) <= 128
    Options(**order.options | {"stop": tuple(order.options["stop"])}).validate()


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=60) | st.builds(lambda v: json.dumps(v).encode(), VALUES))
def test_any_bytes_are_an_object_or_refused(body):
    try:
        assert isinstance(read_json(body), dict)
    except Refused as refused:
        assert refused.status == 400


def test_top_p_zero_and_one_and_min_p_zero_mean_what_they_say():
    def options(**body):
        return completion({"model": "m", **body}, ("m",), Limits()).options

    assert options(top_p=1)["top_p"] is None and options(min_p=0)["min_p"] is None
    assert 0 < options(top_p=0)["top_p"] < 1e-6  # the likeliest alone


# --- metrics


def test_a_histogram_counts_into_every_bucket_above():
    histogram = Histogram("s", "Seconds.", "path")
    for seconds in (0.001, 0.3, 1e9):
        histogram.observe(seconds, "/x")
    lines = dict(line.rsplit(" ", 1) for line in histogram.lines()[2:])
    assert lines['s_bucket{path="/x",le="0.005"}'] == "1" and lines['s_bucket{path="/x",le="0.5"}'] == "2"
    assert lines['s_bucket{path="/x",le="+Inf"}'] == lines['s_count{path="/x"}'] == "3"
    assert len(lines) == len(SECONDS) + 3


def test_counters_show_every_digit_and_escape_their_labels():
    counter = Counter("c", "Things.", "name")
    counter.add('a"b\\c\n', amount=123_456_789)
    assert counter.lines()[2] == 'c{name="a\\"b\\\\c\\n"} 123456789'
    metrics = Metrics()
    metrics.show("g", "A gauge.", lambda: True)
    assert "\ng 1\n" in metrics.text() and metrics.text().endswith("\n")


# --- connections


class Transport:
    def __init__(self):
        self.unsent, self.written, self.closed, self.aborted = 0, b"", False, False

    def get_write_buffer_size(self):
        return self.unsent

    def write(self, data):
        self.written += data

    def close(self):
        self.closed = True

    def abort(self):
        self.aborted = True

    def get_extra_info(self, name):
        return None


@pytest.fixture
def connection(monkeypatch):
    import uvicorn
    from uvicorn.server import ServerState

    config = uvicorn.Config(lambda: None, http=Connection, ws="none", lifespan="off", log_config=None)
    loop = asyncio.new_event_loop()
    made = Connection(config, ServerState(), {}, loop)
    monkeypatch.setattr(connections.time, "monotonic", lambda: 100.0)
    made.connection_made(Transport())
    yield made
    loop.close()


def test_who_takes_too_long_to_ask_is_overdue(connection):
    assert not connection.overdue(100 + ASK_S) and connection.overdue(101 + ASK_S)


def test_a_request_under_way_may_take_its_time_and_the_next_one_anew(connection):
    connection.cycle = SimpleNamespace(response_complete=False)
    assert not connection.overdue(1e6)
    connection.cycle.response_complete = True
    assert not connection.overdue(1e6 + 1) and not connection.overdue(1e6 + ASK_S)
    assert connection.overdue(1e6 + 2 + ASK_S)


def test_a_reader_that_leaves_its_answer_untaken_is_overdue(connection, monkeypatch):
    connection.cycle = SimpleNamespace(response_complete=False)
    connection.transport.unsent = 10
    assert not connection.overdue(200) and not connection.overdue(200 + TAKE_S)
    connection.transport.unsent = 0  # it took all: its time begins anew
    assert not connection.overdue(201 + TAKE_S)
    connection.transport.unsent = 10
    assert not connection.overdue(202 + TAKE_S) and connection.overdue(203 + 2 * TAKE_S)
    connections.sweep({connection})
    assert not connection.transport.aborted
    monkeypatch.setattr(connections.time, "monotonic", lambda: 300 + 3 * TAKE_S)
    connections.sweep({connection})
    assert connection.transport.aborted


@pytest.mark.parametrize(("version", "more_body", "complete", "stays"), [
    ("1.1", False, False, True), ("1.1", True, False, False), ("1.1", False, True, False), ("1.0", False, False, False),
])  # fmt: skip
def test_who_ends_its_side_stays_connected_where_its_whole_request_is_here(
    connection, version, more_body, complete, stays
):
    assert not connection.eof_received()
    connection.scope = {"http_version": version}
    connection.cycle = SimpleNamespace(response_complete=complete, more_body=more_body)
    assert connection.eof_received() is stays


def test_one_client_too_many_is_told(connection, monkeypatch):
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 0)
    connection.connection_made(Transport())
    assert connection.transport.written.startswith(b"HTTP/1.1 503 ") and connection.transport.closed
    assert json.loads(connection.transport.written.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many"


# --- the access log


def test_a_log_that_nobody_reads_holds_nobody_up_and_tells_later_what_is_missing(monkeypatch):
    monkeypatch.setattr(access_log, "MOST_WAITING", 4)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writing, b"." * 4096):
            pass
    os.set_blocking(writing, True)  # full, as of a pager that waits for a key
    log = access_log.AccessLog(writing)
    for number in range(100):
        log.add("192.0.2.1", "POST", f"/{number}", "200", 0.5, (3, 4))
    with os.fdopen(reading, "rb") as reader:
        while not (line := reader.readline().lstrip(b".")):
            pass
        assert re.fullmatch(rb"\S+ 192\.0\.2\.1 POST /0 200 in=3 out=4 seconds=0\.500\n", line)
        kept = [reader.readline() for _ in range(3)]
        while b"missing" not in line:
            log.add("::1", "GET", "/late", "404", 0.0)
            line = reader.readline()
        assert kept and int(re.search(rb" (\d+) requests are missing", line)[1]) > 90
        log.close()
    os.close(writing)


def test_a_log_whose_reader_has_gone_ends_nothing():
    reading, writing = os.pipe()
    os.close(reading)
    log = access_log.AccessLog(writing)
    for _ in range(3):
        log.add("::1", "GET", "/health", "200", 0.0)
    log.close()
    os.close(writing)


# --- bodies


def test_the_bodies_that_come_in_are_bounded_together(monkeypatch):
    monkeypatch.setattr(app_module, "BODIES_BYTES", 150)

    class Sent:
        headers: ClassVar[dict] = {}

        def __init__(self):
            self.goes_on = asyncio.Event()

        async def stream(self):
            yield b"x" * 90
            await self.goes_on.wait()
            yield b"y"

    async def both():
        bodies, limits = app_module.Bodies(), Limits(body_bytes=100)
        waiting = Sent()
        first = asyncio.create_task(bodies.read(waiting, limits))
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="coming in") as refused:
            await bodies.read(Sent(), limits)
        assert refused.value.status == 503 and "Retry-After" in refused.value.headers
        waiting.goes_on.set()
        assert len(await first) == 91
        late = Sent()
        late.goes_on.set()
        assert len(await bodies.read(late, limits)) == 91

    asyncio.run(both())


# --- failures of our own


def test_a_mistake_of_ours_is_a_json_error_and_its_traceback_stays_here(capsys):
    import httpx

    from cllm_spheres.web.app import make_app
    from cllm_spheres.web.guard import Rules

    app = make_app(SimpleNamespace(models={"m": None}), Metrics(), Rules.of("127.0.0.1"), Limits())  # no engine at all

    async def ask():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/v1/completions", json={"model": "m"}), await client.get("/health")

    for response in asyncio.run(ask()):
        assert response.status_code == 500 and response.json()["error"]["code"] == "internal_error"
        assert "AttributeError" not in response.text
    assert "AttributeError" in capsys.readouterr().err


# --- answers


def test_what_brings_nothing_makes_no_chunk():
    order = completion({"model": "m", "stream": True}, ("m",), Limits())
    answer = Answer(order)
    assert answer.take(0, {"begun": 3, "prompt": ""}, keep=False) is None
    assert answer.take(0, {"text": "", "new": 1}, keep=False) is None  # the first byte of a character
    assert answer.take(0, {"text": "ä", "new": 1}, keep=False)["text"] == "ä"
    assert not answer.complete
    last = answer.take(0, {"text": "", "new": 0, "ended": "stop"}, keep=False)
    assert last["finish_reason"] == "stop" and answer.complete
    assert answer.usage == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
