"""Orders -> events of their texts: a queue before the process of inference, which is replaced when it dies.

Texts of a model wait in the order in which they came, and as many are being written as it has slots. What is in flight
when the process dies is refused with 500; what still waits stays in the queue.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cllm_spheres.errors import InputError, RunFailed
from cllm_spheres.web.link import Link, Setup, how_ended
from cllm_spheres.web.metrics import Metrics
from cllm_spheres.web.refusals import Refused, bad
from cllm_spheres.web.requests import Order

SILENCE_S = 120.0  # without a step of a text that is being written, or an answer to an order: the process hangs
BACKOFF_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # before the n-th start in a row that did not live for STEADY_S
STEADY_S = 30.0
LONGEST_RETRY_S = 60
RETRY_DOWN_S = 10


@dataclass(eq=False)
class Text:
    """One of a request's texts."""

    id: int
    model: str
    request: Request
    index: int
    message: dict[str, Any]  # what the process is told
    began: float | None = None


@dataclass(eq=False)
class Request:
    """An order under way. `events` are (index, event); what they can hold is bounded by the order's tokens."""

    order: Order
    texts: list[Text] = field(default_factory=list)
    events: asyncio.Queue[tuple[int, dict[str, Any]]] = field(default_factory=asyncio.Queue)
    since: float = field(default_factory=time.monotonic)
    has_token: bool = False


@dataclass
class Model:
    """What one model is, who waits for it, and who is being written."""

    number: int
    block_size: int
    vocab_size: int
    longest: int | None
    since: int = field(default_factory=lambda: int(time.time()))
    waiting: deque[Text] = field(default_factory=deque)
    running: dict[int, Text] = field(default_factory=dict)

    def become(self, about: dict[str, Any]) -> None:
        """Take what a new process says of the model: its run may have been trained anew, in another shape."""
        for name, value in about.items():
            setattr(self, name, value)


class Engine:
    """The parent's side of inference. For one event loop; `start` before anything else, `close` at the end."""

    def __init__(self, setup: Setup, metrics: Metrics, queue: int) -> None:
        self.setup, self.metrics, self.queue = setup, metrics, queue
        self.models: dict[str, Model] = {}
        self.restarts = 0
        self.last_end = ""
        self._link: Link | None = None
        self._ready = False
        self._down = ""  # why it could not be started again, the last time
        self._ids = itertools.count()
        self._ended_for = ""  # why we have killed the process
        self._unanswered: set[int] = set()  # texts of which the process has said nothing yet, cancelled ones too
        self.supervisor: asyncio.Task[None] | None = None  # ends only with a mistake of ours
        self._heard = time.monotonic()
        self._text_s = 1.0  # how long a text takes, about
        metrics.show("cllm_queue_length", "Texts that wait.", lambda: self.waiting)
        metrics.show("cllm_running", "Texts being written.", lambda: self.running)
        metrics.show("cllm_inference_alive", "1 while the process of inference can write.", lambda: self.alive)

    @property
    def waiting(self) -> int:
        return sum(len(model.waiting) for model in self.models.values())

    @property
    def running(self) -> int:
        return sum(len(model.running) for model in self.models.values())

    @property
    def alive(self) -> bool:
        """Whether the process of inference can write."""
        return self._ready and self._link is not None and self._link.alive

    async def start(self) -> None:
        """Load all models. InputError where one cannot be loaded."""
        await self._open()
        self.supervisor = asyncio.create_task(self._supervise())

    async def close(self) -> None:
        """End the process."""
        if self.supervisor:
            self.supervisor.cancel()
            await asyncio.gather(self.supervisor, return_exceptions=True)
        if self._link:
            await self._link.end()

    def submit(self, order: Order) -> Request:
        """Queue an order's texts. Refused: 400 for ids that cannot be, 429 where the queue is full, 503 where nobody
        can write.
        """
        model = self.models[order.model]
        if self._down:
            why = f"The process that writes cannot be started: {self._down}"
            raise Refused(503, why, code="inference_down", headers={"Retry-After": str(RETRY_DOWN_S)})
        for prompt in order.prompts:
            _check(prompt, model)
        texts = order.texts
        room = self.setup.slots - len(model.running) if self.alive and not model.waiting else 0
        if self.waiting + len(texts) - max(0, room) > self.queue:
            retry_s = min(LONGEST_RETRY_S, max(1, math.ceil(self._text_s * self.waiting / self.setup.slots)))
            raise Refused(
                429, f"{self.waiting} texts wait and {self.running} are being written: with {len(texts)} more there"
                f" would be too many for a queue of {self.queue}. Try again in {retry_s} s.",
                code="queue_full", headers={"Retry-After": str(retry_s)},
            )  # fmt: skip
        request = Request(order)
        for index, (prompt, sample) in enumerate(texts):
            what = {"messages": order.messages} if order.chat else {"prompt": prompt}
            message = {
                "begin": next(self._ids), "model": model.number, "sample": sample, "options": order.options,
                "echo": order.echo, "names": order.logprobs is not None, **what,
            }  # fmt: skip
            text = Text(message["begin"], order.model, request, index, message)
            request.texts.append(text)
            model.waiting.append(text)
        self._dispatch(model)
        return request

    def cancel(self, request: Request) -> None:
        """Nobody wants it any more: its texts leave the queue and their slots. Nothing where it has ended."""
        model = self.models[request.order.model]
        for text in request.texts:
            if model.running.pop(text.id, None):
                self._say({"cancel": text.id})
            elif text in model.waiting:
                model.waiting.remove(text)
        request.texts.clear()
        self._dispatch(model)

    def watch(self) -> None:
        """Kill a process that has been silent for too long: called about once a second.

        One whose clients have all left is still waited for: it answers every order, and those of the clients that come
        next would wait for nothing.
        """
        if self.alive and self._is_owed and time.monotonic() - self._heard > SILENCE_S:
            assert self._link is not None
            self._ended_for = f", because it had been silent for {SILENCE_S:g} s"
            self._link.process.kill()

    @property
    def _is_owed(self) -> bool:
        """Whether the process has something to say."""
        return bool(self.running or self._unanswered)

    def _dispatch(self, model: Model) -> None:
        while (
            self._ready and model.waiting and len(model.running) < self.setup.slots
            and len(self._unanswered) < self.setup.slots  # clients that come and leave do not heap up orders there
        ):  # fmt: skip
            assert self._link is not None
            text = model.waiting.popleft()
            if not self._is_owed:
                self._heard = time.monotonic()
            text.began = time.monotonic()
            model.running[text.id] = text
            self._unanswered.add(text.id)
            self._link.say(text.message)

    def _dispatch_all(self) -> None:
        for model in self.models.values():
            self._dispatch(model)

    def _say(self, message: dict[str, Any]) -> None:
        if self._link:
            self._link.say(message)

    async def _open(self) -> None:
        """Start a process and wait until it has loaded the models; what they are may have changed since the last one.

        InputError where a model cannot be loaded, RunFailed where the process ends, or hangs.
        """
        try:
            self._link = await Link.start(self.setup)
        except OSError as error:  # no memory, process or descriptor was free
            raise RunFailed(f"The process of inference cannot be started: {error.strerror}.") from None
        abouts = await self._link.loaded()
        for number, (name, about) in enumerate(zip(self.setup.runs, abouts, strict=True)):
            if name in self.models:
                self.models[name].become(about)
            else:
                self.models[name] = Model(number, **about)
        self._ready, self._heard = True, time.monotonic()
        self._unanswered.clear()

    async def _supervise(self) -> None:
        """Pass on what the process says; replace it whenever it ends."""
        failures = 0
        while True:
            assert self._link is not None
            began = time.monotonic()
            while (told := await self._link.read()) is not None:
                self._heard = time.monotonic()
                for event in told:
                    self._pass_on(event)
                self._dispatch_all()
            self._ready = False
            how = how_ended(await self._link.end())
            self._lost(f"by SIGKILL{self._ended_for}" if self._ended_for else how)
            self._ended_for = ""
            failures = 0 if time.monotonic() - began > STEADY_S else failures
            while not self._ready:
                await asyncio.sleep(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)])
                failures += 1
                try:
                    await self._open()
                except (InputError, RunFailed) as error:
                    self._down = str(error)
                    self._complain(f"It could not be started again: {error}")
            self._down = ""
            self.restarts += 1
            self.metrics.restarts.add()
            self._dispatch_all()

    def _lost(self, how: str) -> None:
        """Refuse all that was being written."""
        self.last_end = how
        self._complain(f"The process of inference ended: {how}. {self.running} texts were lost; it is started again.")
        message = "The process that writes ended in the middle of this text; it is started again. Try once more."
        for model in self.models.values():
            _refuse(model.running.values(), 500, message, "inference_lost")
            model.running.clear()

    def refuse_all(self) -> None:
        """The server stops: tell those who wait, and those whose texts are being written."""
        for model in self.models.values():
            _refuse([*model.waiting, *model.running.values()], 503, "The server is being stopped.", "stopping")

    def _complain(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def _pass_on(self, event: dict[str, Any]) -> None:
        """An event to its request; of texts that were cancelled meanwhile nobody wants to know."""
        self._unanswered.discard(event["id"])
        running = next((model.running for model in self.models.values() if event["id"] in model.running), {})
        text = running.get(event["id"])
        if text is None:
            return
        request = text.request
        if event.get("new"):
            self.metrics.generated_tokens.add(text.model, amount=event["new"])
            if not request.has_token:
                request.has_token = True
                self.metrics.first_token.observe(time.monotonic() - request.since)
        if "begun" in event and not text.message["sample"]:
            self.metrics.prompt_tokens.add(text.model, amount=event["begun"])
        if "ended" in event or "refused" in event:
            del running[text.id]
            assert text.began is not None
            self._text_s += 0.1 * (time.monotonic() - text.began - self._text_s)
        request.events.put_nowait((text.index, event))


def _refuse(texts: Iterable[Text], status: int, message: str, code: str) -> None:
    for text in texts:
        text.request.events.put_nowait((text.index, {"refused": message, "status": status, "code": code}))


def _check(prompt: str | list[int], model: Model) -> None:
    """Refused where a prompt can be seen to be too long, or to have ids that do not exist, without the tokenizer."""
    block, code = f"the model's block has {model.block_size:,} tokens.", "context_length_exceeded"
    if isinstance(prompt, str):
        if model.longest and len(prompt) > model.longest * model.block_size:
            raise bad(f"The prompt has {len(prompt):,} characters; {block}", "prompt", code)
        return
    if len(prompt) > model.block_size:
        raise bad(f"The prompt has {len(prompt):,} tokens; {block}", "prompt", code)
    wrong = next((token for token in prompt if not 0 <= token < model.vocab_size), None)
    if wrong is not None:
        raise bad(f"The prompt has the token id {wrong}; the vocabulary is 0 to {model.vocab_size - 1:,}.", "prompt")
