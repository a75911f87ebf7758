"""Whatever is wrong with a request: an answer in OpenAI's form of an error, with the right status, and no traceback."""

from __future__ import annotations

import json
import socket

import pytest

from tests.runs import WAIT_S

GOOD = {"model": "run", "prompt": "ab", "max_tokens": 2, "seed": 1}
TALK = {"model": "run", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "seed": 1}
DEEP = b'{"model":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

BODIES = {
    b"": "not JSON", b"{": "not JSON", b"[1]": "must be a JSON object", b"null": "must be a JSON object",
    b'{"model": "run", "temperature": NaN}': "NaN is no number",
    b'{"model": "run", "temperature": -Infinity}': "-Infinity is no number",
    b'{"model": "run", "temperature": 1e999}': "too large",
    b'{"model": "run", "max_tokens": ' + b"9" * 5000 + b"}": "5000 digits",
    b'{"model": "run", "prompt": "\\ud800"}': "which is no character",
    b'{"model": "run", "model": "run"}': "stands there twice",
    b'{"model": "\xff"}': "not UTF-8", DEEP: "nested too deeply",
}  # fmt: skip

WRONG = [
    ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [True]}, "prompt"), ({"prompt": {"a": 1}}, "prompt"), ({"prompt": [1.0]}, "prompt"),
    ({"prompt": [257]}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"prompt": [1] * 65}, "prompt"),
    ({"prompt": "a" * 65}, "prompt"), ({"prompt": [10**19]}, "prompt"), ({"prompt": ["a"] * 1000}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"), ({"max_tokens": 10**8}, "max_tokens"), ({"max_tokens": "2"}, "max_tokens"),
    ({"temperature": 3}, "temperature"), ({"temperature": -0.1}, "temperature"), ({"temperature": "1"}, "temperature"),
    ({"top_p": 1.1}, "top_p"), ({"top_k": 0}, "top_k"), ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"seed": -1}, "seed"), ({"seed": 2**63}, "seed"),
    ({"n": 8, "max_tokens": 9_000_000}, "max_tokens"), ({"max_tokens": 1_000_000, "logprobs": 20}, "max_tokens"),
    ({"n": 0}, "n"), ({"n": 1000}, "n"), ({"best_of": 3}, "best_of"), ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"), ({"stop": ["a"] * 5}, "stop"), ({"stop": [""]}, "stop"), ({"stop": 1}, "stop"),
    ({"stop": "x" * 257}, "stop"), ({"echo": 1}, "echo"), ({"stream": "yes"}, "stream"),
    ({"stream_options": {}}, "stream_options"), ({"stream": True, "stream_options": 1}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "usage"), ({"suffix": "x"}, "suffix"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"), ({"presence_penalty": -1}, "presence_penalty"),
    ({"frequency_penalty": False}, "frequency_penalty"), ({"logit_bias": {"1": 5}}, "logit_bias"),
    ({"temprature": 1}, "temprature"), ({"model": 3}, "model"), ({"model": None}, "model"),
]  # fmt: skip

WRONG_TALK = [
    ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"), ({"messages": [1]}, "messages[0]"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "name": "Al"}]}, "name"),
    ({"messages": [{"role": "user", "content": "x", "mood": "y"}]}, "mood"), ({"tools": [{}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"), ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"top_logprobs": 2}, "top_logprobs"), ({"max_completion_tokens": 3}, "max_completion_tokens"),
    ({"echo": True}, "echo"), ({"prompt": "x"}, "prompt"), ({"max_tokens": 0}, "max_tokens"),
]  # fmt: skip


def error_of(response, status=400):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()
    assert error.keys() == {"error"} and error["error"].keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text and len(error["error"]["message"]) < 700  # all parameters by name
    return error["error"]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:40]))
def test_what_is_no_strict_json_is_refused(served, body):
    assert BODIES[body] in error_of(served.client.post("/v1/completions", content=body))["message"]


def test_a_name_that_has_no_bytes_is_refused_all_the_same(served):
    body = json.dumps(GOOD | {"\ud800": 1})  # in escapes
    assert error_of(served.client.post("/v1/completions", content=body))["param"] == "\ud800"


@pytest.mark.parametrize(("change", "param"), WRONG, ids=str)
def test_a_wrong_parameter_is_named(served, change, param):
    assert error_of(served.post("/v1/completions", **{**GOOD, **change}))["param"] == param


@pytest.mark.parametrize(("change", "param"), WRONG_TALK, ids=str)
def test_a_wrong_parameter_of_a_chat_is_named(served, change, param):
    assert error_of(served.post("/v1/chat/completions", **{**TALK, **change}))["param"] == param


def test_what_changes_nothing_is_accepted(served):
    plain = served.complete(max_tokens=3)["choices"]
    neutral = {
        "user": "me",
        "best_of": 1,
        "suffix": "",
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
    }
    assert served.complete(max_tokens=3, **neutral, top_k=None)["choices"] == plain
    talk = {
        "store": True,
        "metadata": {"a": "b"},
        "tools": [],
        "response_format": {"type": "text"},
        "service_tier": "auto",
    }
    one, other = (served.post("/v1/chat/completions", **TALK, **more).json()["choices"] for more in (talk, {}))
    assert one == other


def test_too_long_prompts_have_the_code_that_clients_know(served):
    for prompt in ("a" * 65, "a" * 100_000, [1] * 65):
        error = error_of(served.post("/v1/completions", **{**GOOD, "prompt": prompt}))
        assert error["code"] == "context_length_exceeded" and "64" in error["message"]


def test_one_bad_prompt_refuses_all_and_frees_the_slots(served):
    error_of(served.post("/v1/completions", **{**GOOD, "prompt": ["ab", "a" * 65], "max_tokens": 100_000}))
    assert served.idle()


def test_models_paths_and_methods_that_do_not_exist(served):
    error = error_of(served.post("/v1/completions", **{**GOOD, "model": "rum"}), 404)
    assert error["code"] == "model_not_found" and "did you mean 'run'?" in error["message"]
    assert error_of(served.client.get("/v1/models/rum"), 404)["code"] == "model_not_found"
    assert served.client.get("/v1/models/run").json()["id"] == "run"
    assert "/v1/completions" in error_of(served.client.get("/v1/completion"), 404)["message"]
    response = served.client.get("/v1/completions")
    assert "POST" in error_of(response, 405)["message"] and response.headers["allow"] == "POST"
    error_of(served.client.post("/health"), 405)
    error_of(served.client.get("/v1/models/"), 404)


def test_a_body_that_is_too_large_is_not_read(served):
    error_of(served.client.post("/v1/completions", content=b" " * ((1 << 20) + 1)), 413)
    parts = (b" " * (1 << 20) for _ in range(6))  # chunked: its length is not announced
    error_of(served.client.post("/v1/completions", content=parts), 413)


def test_a_body_in_thousands_of_chunks_is_refused_before_they_are_read(served):
    """Each costs as much as a chunk of 64 KiB, and nobody else is served meanwhile."""
    body = json.dumps(GOOD).encode()
    few = (body[i : i + 1] for i in range(len(body)))
    assert served.client.post("/v1/completions", content=few).status_code == 200
    with socket.create_connection(("127.0.0.1", served.port), timeout=WAIT_S) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b"1\r\n \r\n" * 4097)  # and not the last one
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 400 ")


def test_what_is_no_http_gets_json_too(served):
    for garbage in (b"GARBAGE\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"a" * 20_000):
        with socket.create_connection(("127.0.0.1", served.port), timeout=WAIT_S) as connection:
            connection.sendall(garbage)
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert answer.startswith(b"HTTP/1.1 400 ") and b"application/json" in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
