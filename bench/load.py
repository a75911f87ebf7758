"""`cllm-spheres bench load`: a server under many clients -> is every text right, does anything leak, how fast is it.

Good clients ask, half of them for streams, for texts that a Writer has written alone before. Beside them others read
slowly or not at all, leave at any moment, or send what is no HTTP; then come bodies made wrong at random. What the
server holds (memory, descriptors, tasks, connections, slots) is compared before and after.
"""

from __future__ import annotations

import asyncio
import random
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cllm_spheres_bench.load_fuzz import RAW, body
from cllm_spheres_bench.load_http import Client, encoded
from cllm_spheres_bench.load_report import publish
from cllm_spheres_bench.load_server import Holding, Server

from cllm_spheres.errors import InputError, RunFailed
from cllm_spheres.inference.model import load
from cllm_spheres.inference.options import Options as TextOptions
from cllm_spheres.inference.writer import Writer
from cllm_spheres.training import session
from cllm_spheres.training.launch import Launch

PROMPTS = ("The ", "def ", "import os\n", "", "class A:\n    ", "for i in range(", "# ", "x = [1, 2")
ALLOWED = (400, 404, 413, 429)  # statuses of what a client does wrong
DISTINCT = 64  # texts that are written beforehand
ALONE = 100  # requests of one client alone, half of them for a whole answer
FUZZERS = 32  # connections that send wrong bodies at once


@dataclass(frozen=True)
class Options:
    """Whom the server meets."""

    run: Path | None = None  # None: a small model is trained for a few steps
    clients: int = 200
    requests: int = 10  # of each client
    tokens: int = 64
    bodies: int = 10_000
    slots: int = 32
    seed: int = 1
    out: Path | None = None
    command: str = "cllm-spheres bench load"


@dataclass
class Found:
    """What the clients saw."""

    wrong: list[str] = field(default_factory=list)  # what must not be
    latencies: dict[str, list[float]] = field(default_factory=lambda: {"whole": [], "stream": []})
    first: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)  # one client, while nobody else asks
    tokens: int = 0
    seconds: float = 0.0
    again: int = 0  # 429, and asked again
    statuses: Counter[int] = field(default_factory=Counter)  # of wrong bodies
    calm: Found | None = None  # the same of good clients alone
    others: Counter[str] = field(default_factory=Counter)  # what was done beside


def run(options: Options) -> int:
    """Load, fuzz, compare; print and write what was found. 1 where anything was wrong."""
    if min(options.clients, options.requests, options.slots, options.tokens) < 1 or options.bodies < 0:
        raise InputError("--clients, --requests, --slots and --tokens must be 1 or above, --bodies 0 or above.")
    with tempfile.TemporaryDirectory(prefix="cllm-spheres-") as place:
        run = options.run or _trained(Path(place) / "run")
        print(f"Writing {DISTINCT} texts of {options.tokens} tokens, one at a time ...", flush=True)
        expected = _alone(run, options)
        server = Server(run, slots=options.slots, queue=2 * options.clients)
        try:
            before, after, found = asyncio.run(_measure(server, options, run.absolute().name, expected))
            if "Traceback" in server.said():
                found.wrong.append(f"The server printed a traceback: {server.said()[-2000:]}")
        finally:
            code = server.end()
        if code != 128 + signal.SIGTERM:
            found.wrong.append(f"The server ended with {code} after SIGTERM.")
    return publish(options, found, before, after)


def _trained(path: Path) -> Path:
    """A small model that has seen a few steps."""
    plan = session.new_run(None, {"preset": "small", "steps": 20, "eval_tokens": 2048}, run=path, file=None)
    code, message = Launch().obey(plan).finish()
    if code:
        raise RunFailed(f"The model could not be trained: {message}")
    return path


@dataclass(frozen=True)
class Text:
    """What a Writer wrote."""

    text: str
    tokens: int


def _alone(run: Path, options: Options) -> list[Text]:
    """The texts as a Writer with one slot writes them."""
    model, texts = load(run), []
    writer = Writer(model)
    for number in range(DISTINCT):
        ids = model.tokenizer.encode(PROMPTS[number % len(PROMPTS)]) or [model.tokenizer.eot]
        writer.begin(ids, TextOptions(tokens=options.tokens, temperature=1.0, seed=number))
        text, tokens, ended = "", 0, None
        while not ended:
            for piece in writer.step():
                text, tokens, ended = text + piece.text, tokens + len(piece.tokens), piece.ended
        texts.append(Text(text, tokens))
    writer.close()
    return texts


def _request(number: int, options: Options, model: str, **more: Any) -> bytes:
    prompt = PROMPTS[number % len(PROMPTS)]
    return encoded({"model": model, "prompt": prompt, "max_tokens": options.tokens, "seed": number} | more)


async def _measure(
    server: Server, options: Options, model: str, expected: list[Text]
) -> tuple[Holding, Holding, Found]:  # fmt: skip
    rng = random.Random(options.seed)
    print("A round to warm up ...", flush=True)
    for _ in range(2):  # what allocators and caches take once is no leak
        await _crowd(server, options, model, expected, Found(), rng)
    await _fuzz(server, options, model, min(options.bodies, 1000), Found(), rng)
    before, found = await server.holding(), Found()
    print(f"{options.clients} clients with {options.requests} requests each ...", flush=True)
    found.calm = Found()
    await _crowd(server, options, model, expected, found.calm, None)
    print("The same, and others that misbehave ...", flush=True)
    await _crowd(server, options, model, expected, found, rng)
    single = Found()
    await _ask(server, replace(options, requests=ALONE), model, expected, single, 0)
    found.wrong += found.calm.wrong + single.wrong
    found.alone = single.latencies["whole"]
    print(f"{options.bodies:,} wrong bodies ...", flush=True)
    await _fuzz(server, options, model, options.bodies, found, rng)
    after = await server.holding()
    return before, after, found


async def _crowd(
    server: Server, options: Options, model: str, expected: list[Text], found: Found, rng: random.Random | None
) -> None:
    """All clients at once; with `rng` those who misbehave too, until the last good one has its texts."""
    done = asyncio.Event()
    others = [_leave, _leave, _break, _break, _stall] * max(1, options.clients // 25) if rng else []
    beside = [asyncio.create_task(one(server, options, model, found, rng, done)) for one in others if rng]
    good = [_ask(server, options, model, expected, found, number) for number in range(options.clients)]
    num_slow = max(1, options.clients // 10) if rng else 0
    slow = [_read_slowly(server, options, model, expected, found, n) for n in range(num_slow)]
    slowly, began = asyncio.gather(*slow, return_exceptions=True), time.perf_counter()
    outcomes = await asyncio.gather(*good, return_exceptions=True)
    found.seconds = time.perf_counter() - began
    for outcome in [*outcomes, *await slowly]:
        if isinstance(outcome, BaseException):
            found.wrong.append(f"A request was lost: {outcome!r}")
    done.set()
    for outcome in await asyncio.gather(*beside, return_exceptions=True):
        if isinstance(outcome, BaseException):
            found.wrong.append(f"A misbehaving client failed: {outcome!r}")


async def _ask(
    server: Server, options: Options, model: str, expected: list[Text], found: Found, number: int
) -> None:  # fmt: skip
    """One good client: its requests one after the other, every second one as a stream."""
    client = Client(server.port)
    for turn in range(options.requests):
        which = (number * 7 + turn) % DISTINCT
        kind = "stream" if (number + turn) % 2 else "whole"
        request = _request(which, options, model, stream=kind == "stream")
        while True:
            began = time.perf_counter()
            answer = await client.ask(request)
            if answer.status != 429:
                break
            found.again += 1
            await asyncio.sleep(float(answer.headers[b"retry-after"]))
        found.latencies[kind].append(time.perf_counter() - began)
        if kind == "stream":
            found.first.append(answer.first_s)
        _compare(answer, expected[which].text, found)
        found.tokens += expected[which].tokens
    client.close()


def _compare(answer: Any, expected: str, found: Found) -> None:
    if answer.status != 200:
        found.wrong.append(f"A good request got {answer.problem(())}")
    elif answer.text != expected:
        found.wrong.append(f"Another text: {answer.text[:80]!r}, expected {expected[:80]!r}")


async def _read_slowly(
    server: Server, options: Options, model: str, expected: list[Text], found: Found, number: int
) -> None:  # fmt: skip
    """A stream, an event at a time."""
    client, which = Client(server.port, pause_s=0.05), number % DISTINCT
    answer = await client.ask(_request(which, options, model, stream=True))
    found.others["read slowly"] += 1
    _compare(answer, expected[which].text, found)
    client.close()


async def _leave(
    server: Server, options: Options, model: str, found: Found, rng: random.Random, done: asyncio.Event
) -> None:  # fmt: skip
    """Ask for a long text, and leave without a word."""
    while not done.is_set():
        client = Client(server.port)
        await client.send(_request(rng.randrange(99), options, model, max_tokens=2000, stream=rng.random() < 0.7))
        await asyncio.sleep(rng.random() * 0.2)
        client.close(abruptly=rng.random() < 0.5)
        found.others["left"] += 1


async def _break(
    server: Server, options: Options, model: str, found: Found, rng: random.Random, done: asyncio.Event
) -> None:  # fmt: skip
    """Send what is no HTTP, or only a part of it."""
    while not done.is_set():
        client = Client(server.port)
        _, writer = await client.open()
        writer.write(rng.choice(RAW))
        await asyncio.sleep(rng.random() * 0.1)
        client.close(abruptly=rng.random() < 0.5)
        found.others["sent no HTTP"] += 1


async def _stall(
    server: Server, options: Options, model: str, found: Found, rng: random.Random, done: asyncio.Event
) -> None:  # fmt: skip
    """Ask for streams, and read nothing at all."""
    while not done.is_set():
        client = Client(server.port, pause_s=1.0)
        await client.send(_request(rng.randrange(99), options, model, n=2, max_tokens=200, logprobs=5, stream=True))
        await asyncio.sleep(1.0)
        client.close()
        found.others["read nothing"] += 1


async def _fuzz(
    server: Server, options: Options, model: str, count: int, found: Found, rng: random.Random
) -> None:  # fmt: skip
    """So many wrong bodies, over a few connections."""
    made = iter([body(rng, model) for _ in range(count)])

    async def one() -> None:
        client = Client(server.port)
        for path, data in made:
            answer = await client.ask(data, path)
            found.statuses[answer.status] += 1
            if problem := answer.problem(ALLOWED):
                found.wrong.append(f"{data[:200]!r} got {problem}")
        client.close()

    for outcome in await asyncio.gather(*(one() for _ in range(FUZZERS)), return_exceptions=True):
        if isinstance(outcome, BaseException):
            found.wrong.append(f"A wrong body got no answer: {outcome!r}")
