"""A server in a process of its own, as a person starts it, and the texts that it ought to write."""

from __future__ import annotations

import json
import signal
import socket
from dataclasses import dataclass, field

import httpx
import psutil

from cllm_spheres.inference.model import load
from cllm_spheres.inference.options import Options
from cllm_spheres.inference.writer import Writer
from tests.runs import WAIT_S, begin, lives, wait_until


@dataclass
class Served:
    """The command `serve`, ready to answer. With `with`: ended by SIGTERM at the end."""

    runs: list
    words: list = field(default_factory=list)
    env: dict | None = None

    def __enter__(self) -> Served:
        self.process = begin("serve", *self.runs, "--port", 0, *self.words, env=self.env)
        self.lines = []
        while not self.lines or not self.lines[-1].startswith("Listening"):
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read()
            self.lines.append(line)
        self.url = self.lines[-1].split()[2]
        self.port = int(self.url.rpartition(":")[2])
        self.client = httpx.Client(base_url=self.url, timeout=WAIT_S)
        return self

    def __exit__(self, *_) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.out, self.err = self.process.communicate(timeout=WAIT_S)
        finally:
            self.process.kill()

    @property
    def child(self) -> psutil.Process:
        """The process of inference."""
        return wait_until(lambda: [c for c in psutil.Process(self.process.pid).children() if lives(c)], "a child")[0]

    def post(self, path: str, **body) -> httpx.Response:
        return self.client.post(path, json=body)

    def complete(self, prompt="ab", **body) -> dict:
        """The answer of /v1/completions, which must be 200."""
        response = self.post("/v1/completions", **{"model": "run", "prompt": prompt, "seed": 1} | body)
        assert response.status_code == 200, response.text
        return response.json()

    def health(self) -> dict:
        return self.client.get("/health").json()

    def idle(self) -> bool:
        found = self.health()
        return (found["running"], found["waiting"]) == (0, 0)

    def counter(self, line: str) -> float:
        """A value of /metrics by what stands before it."""
        lines = self.client.get("/metrics").text.splitlines()
        return next((float(found.rpartition(" ")[2]) for found in lines if found.startswith(line + " ")), 0.0)

    def connect(self, body: dict, path: str = "/v1/completions") -> socket.socket:
        """A connection of its own with a request sent and nothing read."""
        data = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        return connection


def events(text: str) -> list[dict]:
    """The JSON of a stream's events; the last one must be [DONE]."""
    found = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert found[-1] == "[DONE]", found[-1]
    return [json.loads(line) for line in found[:-1]]


class Alone:
    """What a Writer writes with nobody beside."""

    def __init__(self, run) -> None:
        self.model = load(run)

    def text(self, prompt, sample: int = 0, **options) -> str:
        writer = Writer(self.model)
        ids = self.model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        writer.begin(ids or [self.model.tokenizer.eot], Options(**{"temperature": 1.0, "seed": 1} | options), sample)
        text, ended = "", None
        while not ended:
            for piece in writer.step():
                text, ended = text + piece.text, piece.ended
        writer.close()
        return text
