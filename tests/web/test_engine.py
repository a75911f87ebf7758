"""The engine by itself, with a process of inference that is played: what it does when that hangs, fails or changes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from types import SimpleNamespace

import pytest

from cllm_spheres.errors import RunFailed
from cllm_spheres.web import engine as engine_module
from cllm_spheres.web import link as link_module
from cllm_spheres.web.engine import BACKOFF_S, Engine
from cllm_spheres.web.link import Link, Setup
from cllm_spheres.web.metrics import Metrics
from cllm_spheres.web.refusals import Refused
from cllm_spheres.web.requests import Limits, completion

ABOUT = {"block_size": 64, "vocab_size": 257, "longest": 1}
WAIT_S = 30  # for what needs no process and no time of its own
HANGS, DIES = "hangs", "dies"


class Played(Link):
    """A link to a process that loads what it is told to load, or hangs, and writes nothing by itself."""

    alive = True  # in the place of Link's property
    computes = False

    def __init__(self, setup, about) -> None:
        self.setup, self.said = setup, []
        self.messages: asyncio.Queue = asyncio.Queue()
        if about != HANGS:
            self.messages.put_nowait(None if about == DIES else {"loaded": about})
        self.process = self

    def kill(self) -> None:
        if self.alive:
            self.alive = False
            self.messages.put_nowait(None)

    async def read(self):
        return await self.messages.get()

    def computed_s(self) -> float:
        return time.monotonic() * 1e6 if self.computes else 0.0

    def say(self, message) -> None:
        self.said.append(message)

    def answer(self, *events) -> None:
        self.messages.put_nowait(list(events))

    async def end(self) -> int:
        self.alive = False
        return -9


@pytest.fixture
def play(monkeypatch):
    """play(abouts, visit): an engine whose processes, one after another, are played with `abouts`."""
    monkeypatch.setattr(engine_module, "BACKOFF_S", (0.0,))
    monkeypatch.setattr(link_module, "LOOK_S", 0.005)

    def run(abouts, visit):
        links = []

        async def start(setup):
            about = abouts[len(links)] if len(links) < len(abouts) else HANGS
            if isinstance(about, OSError):
                links.append(None)
                raise about
            links.append(Played(setup, about))
            return links[-1]

        async def all_of_it():
            engine = Engine(Setup({"run": "runs/run"}, slots=2), Metrics(), queue=8)
            async with asyncio.timeout(WAIT_S):
                try:
                    await visit(engine, links)
                finally:
                    await engine.close()

        monkeypatch.setattr(Link, "start", start)
        asyncio.run(all_of_it())

    return run


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def order(prompt="ab"):
    return completion({"model": "run", "prompt": prompt}, ("run",), Limits())


def test_a_process_that_hangs_while_it_loads_is_ended_and_replaced(play, monkeypatch, capsys):
    async def visit(engine, links):
        await engine.start()
        monkeypatch.setattr(link_module, "STILL_S", 0.03)  # the first one needs none of it
        links[0].kill()
        await until(lambda: engine.alive)
        assert len(links) == 3 and not links[1].alive and engine.restarts == 1

    play([ABOUT, HANGS, ABOUT], visit)
    assert "did nothing for 0 s while it loaded runs/run, and was ended" in capsys.readouterr().err


def test_a_server_whose_first_process_hangs_does_not_begin(play, monkeypatch):
    monkeypatch.setattr(link_module, "STILL_S", 0.03)

    async def visit(engine, links):
        with pytest.raises(RunFailed, match=r"while it loaded runs/run.*try again"):
            await engine.start()
        assert not links[0].alive

    play([HANGS], visit)


def test_a_process_that_computes_has_time_to_compile_but_not_for_ever(play, monkeypatch):
    monkeypatch.setattr(link_module, "STILL_S", 0.0)  # a process that stands still would be ended at once
    monkeypatch.setattr(link_module, "LOAD_S", 0.05)
    monkeypatch.setattr(Played, "computes", True)

    async def visit(engine, links):
        with pytest.raises(RunFailed, match=r"took 0 s while it loaded runs/run"):
            await engine.start()
        assert not links[0].alive

    play([HANGS], visit)


def test_a_start_for_which_there_is_no_memory_or_descriptor_is_tried_again(play, capsys):
    async def visit(engine, links):
        await engine.start()
        links[0].kill()
        await until(lambda: engine.alive)
        assert len(links) == 4

    play([ABOUT, OSError(12, "Cannot allocate memory"), DIES, ABOUT], visit)
    assert (
        "could not be started again: The process of inference cannot be started: Cannot all" in capsys.readouterr().err
    )


def test_starts_that_fail_in_a_row_come_in_growing_pauses(play, monkeypatch, capsys):
    """A request that ends the process each time, or a damaged run, costs a start now and then and no more."""
    pauses = []

    async def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == 9:
            await real(WAIT_S)
        await real(0)

    async def visit(engine, links):
        monkeypatch.setattr(engine_module, "BACKOFF_S", BACKOFF_S)
        monkeypatch.setattr(engine_module, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": pause}))
        await engine.start()
        for _ in range(2):  # it lives for a moment each time
            await until(lambda: engine.alive)
            links[-1].kill()
            await until(lambda: not engine.alive)
        await until(lambda: len(pauses) == 9)
        assert pauses == [0, 1, 2, 5, 10, 30, 30, 30, 30]

    real = asyncio.sleep
    play([ABOUT, ABOUT, *[DIES] * 20], visit)


def test_a_run_that_was_trained_anew_in_another_shape_is_served_in_it(play):
    async def visit(engine, links):
        await engine.start()
        with contextlib.suppress(Refused):
            engine.submit(order("a" * 100))
            pytest.fail("the block has 64 tokens")
        links[0].kill()
        await until(lambda: engine.restarts)
        assert engine.models["run"].block_size == 128 and engine.models["run"].vocab_size == 300
        engine.submit(order("a" * 100))
        engine.submit(order([299]))
        assert [message["prompt"] for message in links[1].said] == ["a" * 100, [299]]

    play([ABOUT, {"block_size": 128, "vocab_size": 300, "longest": 1}], visit)


def test_clients_that_leave_and_come_do_not_keep_a_process_that_hangs_alive(play, monkeypatch, capsys):
    now = [0.0]

    async def visit(engine, links):
        monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
        await engine.start()
        for _ in range(4):  # each gives up before the process's time is over
            request = engine.submit(order())
            now[0] += 50
            engine.watch()
            engine.cancel(request)
            if not links[0].alive:
                break
        await until(lambda: engine.restarts)
        now[0] += 500  # an idle process has nothing to say
        engine.watch()
        request = engine.submit(order())
        links[1].answer({"id": request.texts[0].id, "begun": 2, "prompt": ""})
        await until(lambda: not request.events.empty())
        engine.cancel(request)
        now[0] += 500
        engine.watch()
        assert links[1].alive

    play([ABOUT, ABOUT], visit)
    assert "because it had been silent for 120 s" in capsys.readouterr().err


def test_clients_that_leave_at_once_heap_nothing_up_in_a_process_that_is_slow(play):
    async def visit(engine, links):
        await engine.start()
        for _ in range(50):
            engine.cancel(engine.submit(order()))
        begun = [message["begin"] for message in links[0].said if "begin" in message]
        assert len(begun) == 2  # as many as it has slots
        for _ in range(8):
            engine.submit(order())
        with pytest.raises(Refused, match="queue of 8") as refused:
            engine.submit(order())
        assert refused.value.status == 429
        links[0].answer({"id": begun[0], "begun": 2, "prompt": ""})
        await until(lambda: engine.running == 1)

    play([ABOUT], visit)


def test_a_process_that_not_even_sigkill_ends_holds_nothing_up(monkeypatch):
    class Stuck:
        def poll(self):
            return None

        kill = wait = poll

    async def end():
        ours, theirs = socket.socketpair()
        with theirs:
            return await Link(Setup({}), Stuck(), *await asyncio.open_connection(sock=ours)).end()

    monkeypatch.setattr(link_module, "END_S", 0.02)
    assert asyncio.run(end()) is None
    assert "not even SIGKILL" in link_module.how_ended(None)
