"""Clients that leave, queues that are full, a process that dies, signals: nothing is lost, nothing stays behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import psutil
import pytest

from tests.runs import WAIT_S, command_here, lives, shared_files, wait_until
from tests.web.served import Served

# Greedy, it never comes to an end of text; it takes minutes, if nobody ends it.
LONG = {"model": "run", "prompt": "ab", "max_tokens": 1_000_000, "temperature": 0}
SHORT = {"model": "run", "prompt": "ab", "max_tokens": 5, "seed": 1}


def running(server, count):
    wait_until(lambda: server.health()["running"] == count, f"{count} texts being written")


# --- clients that leave


@pytest.mark.parametrize("stream", [False, True])
def test_closing_the_connection_frees_the_slots(served, stream):
    before = served.counter("cllm_cancelled_total")
    connection = served.connect(LONG | {"n": 3, "stream": stream})
    running(served, 3)
    if stream:
        assert connection.recv(1 << 12).startswith(b"HTTP/1.1 200")
    connection.close()
    wait_until(served.idle, "idle")
    assert served.counter("cllm_cancelled_total") == before + 1
    served.complete(max_tokens=3)


def test_who_leaves_the_queue_is_not_written(served):
    first = served.connect(LONG | {"n": 4})
    running(served, 4)
    second = served.connect(LONG | {"n": 2})
    wait_until(lambda: served.health()["waiting"] == 2, "two to wait")
    second.close()
    wait_until(lambda: served.health()["waiting"] == 0, "none to wait")
    first.close()
    wait_until(served.idle, "idle")


def test_a_reader_that_takes_nothing_does_not_keep_others_from_being_written(served, alone):
    lazy = served.connect(LONG | {"stream": True, "n": 2})
    running(served, 2)
    text = served.complete("the ", max_tokens=20)["choices"][0]["text"]
    assert text == alone.text("the ", tokens=20)
    lazy.close()
    wait_until(served.idle, "idle")


@pytest.mark.parametrize("words", [{}, {"stream": True}])
def test_a_client_that_ends_its_side_gets_its_answers_and_the_end(served, alone, words):
    """As `nc -N` does. Two requests at once, the second asked before the first was answered."""
    connection = served.connect({"model": "run", "prompt": "ab", "max_tokens": 30, "seed": 1} | words)
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    connection.shutdown(socket.SHUT_WR)
    answer = b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()
    assert answer.count("HTTP/1.1 200 OK") == 2 and answer.endswith('"running":0}')
    if not words:
        assert json.dumps(alone.text("ab", tokens=30)) in answer


def test_a_client_that_ends_its_side_in_the_queue_is_asked_whether_it_is_there(served):
    first = served.connect(LONG | {"n": 4})
    running(served, 4)
    second = served.connect(SHORT)
    second.shutdown(socket.SHUT_WR)
    assert second.recv(1 << 10).startswith(b"HTTP/1.1 100 ")  # it waits, and is still there
    first.close()
    rest = b"".join(iter(lambda: second.recv(1 << 16), b""))
    assert b"HTTP/1.1 200 OK" in rest and b'"finish_reason"' in rest
    wait_until(served.idle, "idle")


# --- the queue


def test_beyond_the_queue_there_is_429_and_when_to_come_again(served):
    connections = [served.connect(LONG | {"n": 4}), served.connect(LONG | {"n": 8})]
    wait_until(lambda: served.health()["waiting"] == 8, "a full queue")
    refused = served.post("/v1/completions", **SHORT)
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    for connection in connections:
        connection.close()
    wait_until(served.idle, "idle")
    served.complete(max_tokens=3)


def test_what_waits_is_written_in_the_end(served, alone):
    answer = served.complete("ab", n=8, max_tokens=30)  # 4 slots
    assert [c["text"] for c in answer["choices"]] == [alone.text("ab", sample, tokens=30) for sample in range(8)]
    more = served.post("/v1/completions", **SHORT | {"n": 9})
    assert more.status_code == 400 and more.json()["error"]["param"] == "n"  # would never fit the queue


def test_a_request_that_takes_too_long_is_ended(run):
    with Served([run], ["--timeout", 0.5, "--max-tokens", 1_000_000]) as server:
        assert server.post("/v1/completions", **LONG).status_code == 504
        streamed = server.post("/v1/completions", **LONG, stream=True)
        last = json.loads(streamed.text.strip().rpartition("data: ")[2])
        assert streamed.status_code == 200 and last["error"]["code"] == "timeout"
        wait_until(server.idle, "idle")


# --- the process of inference


def test_a_process_that_dies_is_replaced_and_its_requests_are_told(run, alone):
    with Served([run], ["--slots", 2, "--max-tokens", 1_000_000]) as server:
        first = server.child
        assert first.nice() > psutil.Process(server.process.pid).nice()
        answers = []
        whole = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", **LONG)))
        whole.start()
        stream = server.connect(LONG | {"stream": True})
        running(server, 2)
        waiting = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", **SHORT)))
        waiting.start()
        wait_until(lambda: server.health()["waiting"] == 1, "one to wait")
        wait_until(lambda: b"data:" in stream.recv(1 << 16), "a piece")
        first.send_signal(signal.SIGKILL)
        whole.join(WAIT_S)
        assert answers[0].status_code == 500 and answers[0].json()["error"]["type"] == "server_error"
        wait_until(lambda: b'"code":"inference_lost"' in stream.recv(1 << 20), "the stream's error")
        waiting.join(WAIT_S)  # it waited, and was not lost
        assert answers[1].status_code == 200
        assert answers[1].json()["choices"][0]["text"] == alone.text("ab", tokens=5)
        found = server.client.get("/health")
        assert found.status_code == 200 and found.json()["inference"]["restarts"] == 1
        assert "SIGKILL" in found.json()["inference"]["last_end"]
        assert server.counter("cllm_inference_restarts_total") == 1
        assert server.child.pid != first.pid
    assert "2 texts were lost" in server.err


def test_health_tells_while_the_process_is_gone(run):
    with Served([run]) as server:
        moved = run.with_name("moved")
        os.rename(run, moved)  # so that it cannot be loaded again
        try:
            server.child.send_signal(signal.SIGKILL)
            wait_until(lambda: server.client.get("/health").status_code == 503, "503")
            assert server.health()["status"] == "down" and server.counter("cllm_inference_alive") == 0
            down = wait_until(lambda: _refused(server), "503 for requests")
            assert down.json()["error"]["code"] == "inference_down" and down.headers["retry-after"] == "10"
        finally:
            os.rename(moved, run)
        wait_until(lambda: server.client.get("/health").status_code == 200, "the new process")
        server.complete(max_tokens=2)


def _refused(server):
    """The answer to a request, where it is 503."""
    try:
        response = server.client.post("/v1/completions", json=SHORT, timeout=0.5)
    except httpx.TimeoutException:
        return None  # it waits for the first try to start the process again
    return response if response.status_code == 503 else None


def test_no_process_survives_a_server_that_is_killed(run):
    before = shared_files()
    with Served([run]) as server:
        child = server.child
        server.process.kill()
        wait_until(lambda: not lives(child), "the child's end")
    assert shared_files() <= before


# --- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_requests_in_flight_end(run, number, code):
    with Served([run], ["--max-tokens", 1_000_000]) as server:
        child, answers = server.child, []
        body = LONG | {"max_tokens": 2000}  # well within the five seconds, on a busy machine too
        asking = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", **body)))
        asking.start()
        running(server, 1)
        server.process.send_signal(number)
        asking.join(WAIT_S)
        assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] == 2000
        assert server.process.wait(WAIT_S) == code
        assert not lives(child)
    assert re.fullmatch(rf"Interrupted: Stopped by {signal.Signals(number).name}\. .*\n", server.err), server.err


def test_a_request_that_outlasts_the_grace_is_told(run):
    with Served([run], ["--max-tokens", 1_000_000]) as server:
        stream, answers = server.connect(LONG | {"stream": True}), []
        asking = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", **LONG)))
        asking.start()
        running(server, 2)
        server.process.send_signal(signal.SIGTERM)
        rest = b"".join(iter(lambda: stream.recv(1 << 20), b""))
        assert b'"code":"stopping"' in rest
        asking.join(WAIT_S)
        assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "stopping"
        assert server.process.wait(WAIT_S) == 143


def test_a_second_signal_ends_at_once(run):
    with Served([run], ["--max-tokens", 10_000_000]) as server:
        child, connection = server.child, server.connect(LONG | {"max_tokens": 10_000_000, "stream": True})
        running(server, 1)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.5)  # sooner, it counts as the same wish
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(WAIT_S) == 130
        assert not lives(child)
        connection.close()
    assert "Traceback" not in server.err, server.err


def test_a_signal_while_the_models_are_loaded_ends_it(run):
    from tests.runs import begin

    process = begin("serve", run, "--port", 0)
    assert process.stdout.readline().startswith("Loading")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 143 and err == "Interrupted: Stopped by SIGTERM. Nothing was served yet.\n"


# --- the beginning


def test_a_port_in_use_names_who_uses_it(served, run, tmp_path):
    done = command_here("serve", run, "--port", served.port, cwd=tmp_path)
    assert done.returncode == 2
    assert f"Port {served.port} of 127.0.0.1 is in use by process {served.process.pid}" in done.stderr
    assert f"--port {served.port + 1}" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("words", "said"), [
    (["--host", "0.0.0.0"], "needs an API key"),
    (["--host", "192.0.2.1", "--api-key-file", "KEY"], "Cannot listen"),
    (["--host", "no such host", "--api-key-file", "KEY"], "no address"),
    (["--port", "70000"], "give 1 to 65535"),
    (["--api-key-file", "none"], "Cannot read the API key in none"),
    (["--api-key-file", "EMPTY"], "at least 16"),
    (["--dtype", "int8"], "fp32 or bf16"),
    (["--slots", "0", "--queue", "0"], "--queue 0"),
    (["--checkpoint", "77"], "77"),
    (["--timeout", "nan"], "seconds above 0"),
])  # fmt: skip
def test_what_cannot_be_served_is_refused_in_words(run, tmp_path, words, said):
    (tmp_path / "KEY").write_text("x" * 20)
    (tmp_path / "EMPTY").write_text("")
    done = command_here("serve", run, "--port", "0", *words, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and done.stderr.startswith("InputError"), done.stderr


def test_runs_that_are_none_or_have_the_same_name(run, tmp_path):
    done = command_here("serve", tmp_path / "nothing", "--port", "0", cwd=tmp_path)
    assert "There is no run" in done.stderr
    (tmp_path / "run").mkdir()
    done = command_here("serve", run, tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 2 and "both named run" in done.stderr


def test_several_runs_are_several_models(run, tmp_path):
    (tmp_path / "other").symlink_to(run)
    with Served([run, tmp_path / "other"]) as server:
        assert [model["id"] for model in server.client.get("/v1/models").json()["data"]] == ["run", "other"]
        one, other = (server.complete(model=name, max_tokens=9)["choices"] for name in ("run", "other"))
        assert one == other
        assert server.counter('cllm_generated_tokens_total{model="other"}') == 9


def test_without_the_extra_the_command_says_what_to_install(run):
    code = (
        "import sys; sys.modules['uvicorn'] = None; from cllm_spheres_cli import main;"
        f"sys.argv = ['cllm-spheres', 'serve', {str(run)!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 2 and "pip install 'cllm-spheres[web]'" in done.stderr


# --- metrics


def test_metrics_count_what_happened(served):
    labels = '{path="/v1/completions",status="200"}'
    before = [
        served.counter(f"cllm_requests_total{labels}"),
        served.counter('cllm_generated_tokens_total{model="run"}'),
    ]
    asked = served.counter('cllm_prompt_tokens_total{model="run"}')
    served.complete("abc", max_tokens=7)
    # counted once all is done, which is just after the client has its answer
    wait_until(lambda: served.counter(f"cllm_requests_total{labels}") == before[0] + 1, "the request to be counted")
    assert served.counter('cllm_generated_tokens_total{model="run"}') == before[1] + 7
    assert served.counter('cllm_prompt_tokens_total{model="run"}') == asked + 3
    served.client.get("/a/path/of/somebody")
    text = served.client.get("/metrics").text
    assert "somebody" not in text and 'cllm_requests_total{path="other",status="404"}' in text
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|\w+(\{(\w+="[^"]*",?)+\})? [0-9.e+-]+', line), line
    count = served.counter('cllm_request_seconds_count{path="/v1/completions"}')
    assert served.counter('cllm_request_seconds_bucket{path="/v1/completions",le="+Inf"}') == count > 0
