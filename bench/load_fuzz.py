"""A random number generator -> bodies and raw requests that no well-meaning client sends."""

from __future__ import annotations

import json
import random
from typing import Any

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, "", "a", "\ud800", "\x00", "😀" * 9,
    "x" * 5000, [], [[]], {}, [None], [1, 2], [1, "a"], ["a", "b"], [-1], [10**9], [[1], ["a"]], {"a": {}}, [1.5],
    "NaN",
)  # fmt: skip
NAMES = (
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "n", "best_of", "stop", "seed", "logprobs", "top_logprobs", "echo", "stream",
    "stream_options", "tools", "suffix", "logit_bias", "user", "frequency_penalty", "__proto__", "role", "content", "",
)  # fmt: skip
WORDS = (
    b"NaN", b"Infinity", b"1e999", b"-", b"[" * 5000, b"{" * 5000, b"\xff\xfe", b'"', b"\\u12", b"9" * 5000, b"\x00",
)  # fmt: skip
RAW = (
    b"", b"\r\n\r\n", b"GARBAGE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000, b"DELETE /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /%ff%00 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50,
)  # fmt: skip


def body(rng: random.Random, model: str) -> tuple[str, bytes]:
    """(path, body): a small good request with a few things wrong; now and then nothing is."""
    if rng.random() < 0.3:
        path, good = "/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": "a"}]}
    else:
        path, good = "/v1/completions", {"model": model, "prompt": rng.choice(("a", [1, 2], ["a", "b"]))}
    wrong: dict[str, Any] = good | {"max_tokens": rng.choice((1, 2, 3)), "stream": rng.random() < 0.3}
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        wrong[rng.choice(NAMES)] = rng.choice(NASTY)
    if isinstance(wrong.get("max_tokens"), int) and wrong["max_tokens"] > 4:  # it would be right, and take long
        wrong["max_tokens"] = 10**7
    if rng.random() < 0.1 and isinstance(wrong.get("messages"), list):
        wrong["messages"] = [rng.choice(NASTY) for _ in range(3)]
    data = bytearray(json.dumps(wrong).encode())
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0 and data:
            data[at % len(data)] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.randrange(1, 9)]
        elif kind == 2:
            data[at:at] = rng.choice(WORDS)
        elif kind == 3:
            data[at:at] = data[rng.randrange(len(data) + 1) :][:20]
        else:
            del data[at:]
    return path, bytes(data)
