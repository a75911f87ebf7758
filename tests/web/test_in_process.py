"""The server inside of this process, where its times can be made short."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading

import httpx
import pytest

from cllm_spheres.errors import Interrupted
from cllm_spheres.web import connections, engine
from cllm_spheres.web.link import Setup
from cllm_spheres.web.requests import Limits
from cllm_spheres.web.server import Settings, serve
from tests.runs import WAIT_S, wait_until

LONG = '{"model": "run", "prompt": "ab", "max_tokens": 1000000, "temperature": 0, "stream": true, "logprobs": 20}'


def serving(run, visit):
    """Serve here while `visit(url)` runs in a thread; what it raises is raised."""
    problems = []

    def say(line):
        if line.startswith("Listening"):
            threading.Thread(target=visiting, args=(line.split()[2],)).start()

    def visiting(url):
        try:
            visit(url)
        except BaseException as error:
            problems.append(error)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = Settings(Setup({"run": run}), port=0, limits=Limits(tokens=10_000_000, scores=10**9))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    with pytest.raises(Interrupted, match="SIGTERM"):
        serve(settings, say)
    for number, handler in before.items():
        signal.signal(number, handler)
    if problems:
        raise problems[0]


def test_a_reader_that_takes_nothing_is_cut_off_and_its_slot_is_free(run, monkeypatch):
    monkeypatch.setattr(connections, "TAKE_S", 1.0)

    def visit(url):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that little is on its way
        connection.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(LONG)}\r\n\r\n"
        connection.sendall((head + LONG).encode())

        def running():
            return httpx.get(f"{url}/health").json()["running"]

        wait_until(lambda: running() == 1, "its text to be written")
        wait_until(lambda: running() == 0, "its slot to be free")
        connection.settimeout(WAIT_S)
        rest = b""
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(1 << 16):
                rest = data
        assert b"[DONE]" not in rest  # what was on its way, and no more
        connection.close()
        assert "cllm_cancelled_total 1\n" in httpx.get(f"{url}/metrics").text

    serving(run, visit)


def test_who_asks_too_slowly_is_cut_off(run, monkeypatch):
    monkeypatch.setattr(connections, "ASK_S", 1.0)

    def visit(url):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=WAIT_S) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
            with contextlib.suppress(ConnectionResetError):  # the other way to be told
                assert connection.recv(100) == b""

    serving(run, visit)


def test_a_process_that_is_silent_is_replaced(run, monkeypatch, capfd):
    monkeypatch.setattr(engine, "SILENCE_S", 1.0)

    def visit(url):
        import psutil

        (child,) = [c for c in psutil.Process().children() if "cllm_spheres.web.inference" in c.cmdline()]
        with httpx.stream("POST", f"{url}/v1/completions", content=LONG, timeout=WAIT_S) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data:")
            child.suspend()
            assert any('"code":"inference_lost"' in line for line in lines)
        wait_until(lambda: httpx.get(f"{url}/health").json()["inference"]["restarts"] == 1, "another process")

    serving(run, visit)
    assert re.search(r"ended: by SIGKILL.* 1 texts were lost", capfd.readouterr().err)
