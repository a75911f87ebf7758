"""Orders on a socket -> texts: `python -m cllm_spheres.web.inference DESCRIPTOR PARENT_PID`, the web server's child.

It computes and does nothing else, at a lower priority than a training, and ends with its parent. Messages are lines of
JSON. The first one in names the runs; a line {"loaded": {...}} for each of them, or {"failed": text}, answers it. Then
come in

    {"begin": id, "model": number, "prompt": text or ids, "sample": i, "options": {...}, "names": bool}
    {"begin": id, "model": number, "messages": [...], ...}          a conversation
    {"cancel": id}

and out goes a line for each order and each step, with a list of what happened to which text:

    {"id": id, "begun": tokens of the prompt, "prompt": its text}
    {"id": id, "text": piece, "new": tokens, "scored": [...], "scored_prompt": [...], "ended": "stop"|"length"}
    {"id": id, "refused": message, "status": 400 or 500}

A scored token is [its bytes, log-probability, [[bytes, log-probability] of the likeliest], the number of the character
in the text with which it begins], with bytes as latin-1, or null for the end of text.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cllm_spheres.errors import InputError, NonFinite, SpheresError
from cllm_spheres.inference.conversation import prompt_of
from cllm_spheres.inference.model import Model, load
from cllm_spheres.inference.options import Options
from cllm_spheres.spheres.server import die_with, ignore_signals
from cllm_spheres.text.dialogue import Message
from cllm_spheres.text.tokenizer import REPLACEMENT, StreamDecoder

if TYPE_CHECKING:
    from cllm_spheres.inference.writer import Piece, Scored, Writer

ORDERS_S = 0.05  # for orders between two steps of the texts
NICE = 5  # a training on the same cores goes first
READ_BYTES = 1 << 16
NOT_FINITE = "not_finite"
LEAST = -9999.0  # OpenAI's log-probability of what cannot be; JSON has no infinity


class Places:
    """Tokens one by one -> with which character of the text each begins."""

    def __init__(self, decoder: StreamDecoder) -> None:
        self._decoder, self._characters = decoder, 0

    def of(self, token: int) -> int:
        """A token that goes on with an open character begins with that one; one that breaks it, behind its U+FFFD."""
        decoder, before, unfinished = self._decoder, self._characters, self._decoder.unfinished
        text = decoder.feed(token)
        self._characters += len(text)
        goes_on = (unfinished + decoder.tokenizer.token_piece(token)).startswith(REPLACEMENT.encode())
        return before + (bool(unfinished) and text.startswith(REPLACEMENT) and not goes_on)

    def end(self) -> int:
        """The number of characters; an open one becomes a U+FFFD."""
        self._characters += len(self._decoder.finish())
        return self._characters


@dataclass
class Text:
    """One text being written, and the places of its tokens where they are asked for."""

    id: int
    places: Places | None


@dataclass(frozen=True)
class Prompt:
    """Token ids, the text that they are, and the strings before which what follows ends in a conversation."""

    ids: list[int]
    text: str
    stop: tuple[str, ...] = ()


@dataclass
class Service:
    """A model, its writer, and the texts that it writes, by the writer's numbers."""

    model: Model
    writer: Writer
    longest: int | None  # bytes of the longest token; None where there is no such bound
    texts: dict[int, Text] = field(default_factory=dict)
    _latest: tuple[Any, Prompt | InputError] | None = None  # what the order before asked for, and what that is

    @classmethod
    def of(cls, run: str, checkpoint: str | None, slots: int, dtype: Any, threads: int | None) -> Service:
        """Load a run and write a token, so that all is compiled. InputError where it cannot be served."""
        model = load(run, checkpoint)
        writer = model.new_writer(slots, dtype=dtype, threads=threads)
        writer.begin([model.tokenizer.eot], Options(tokens=1))
        try:
            while writer.busy:
                writer.step()
        except NonFinite as error:
            raise InputError(f"{run} cannot be served. {error} Give an earlier one with --checkpoint.") from None
        bytes_V = model.tokenizer.token_bytes()
        return cls(model, writer, None if bytes_V is None else int(bytes_V.max()))

    @property
    def about(self) -> dict[str, Any]:
        """What the parent knows of a model."""
        shape = self.model.shape
        return {"block_size": shape.block_size, "vocab_size": shape.vocab_size, "longest": self.longest}

    def begin(self, order: dict[str, Any]) -> dict[str, Any]:
        """Give the order to the writer; what to say about it. InputError where its prompt cannot be used."""
        options = dict(order["options"])
        prompt = self._prompt_of(order)
        options["stop"] = (*prompt.stop, *options["stop"])
        number = self.writer.begin(prompt.ids, Options(**options), order["sample"])
        decoder = StreamDecoder(self.model.tokenizer, () if options["score_prompt"] else prompt.ids)
        self.texts[number] = Text(order["begin"], Places(decoder) if order["names"] else None)
        return {"id": order["begin"], "begun": len(prompt.ids), "prompt": prompt.text if order["echo"] else ""}

    def _prompt_of(self, order: dict[str, Any]) -> Prompt:
        """The prompt of an order. The samples of a request come one after another: theirs is encoded once."""
        asked = order.get("messages"), order.get("prompt"), order["options"]["tokens"]
        if self._latest is None or self._latest[0] != asked:
            try:
                self._latest = asked, self._encoded(*asked)
            except InputError as error:
                self._latest = asked, error
        prompt = self._latest[1]
        if isinstance(prompt, InputError):
            raise prompt
        return prompt

    def _encoded(self, messages: list[dict[str, str]] | None, prompt: str | list[int] | None, tokens: int) -> Prompt:
        if messages is not None:
            turns = [Message(**message) for message in messages]
            chat = prompt_of(turns, self._length, self.model.shape.block_size, reserve=tokens)
            return Prompt(self._encode(chat.text), chat.text, chat.stop)
        if isinstance(prompt, str):
            return Prompt(self._encode(prompt), prompt)
        assert prompt is not None
        return Prompt(prompt, self.model.tokenizer.decode(prompt))

    def _length(self, text: str) -> int:
        """Tokens of a text; at least so many where it is too long for the block whatever they are."""
        least = len(text.encode()) // self.longest if self.longest else 0
        return least if least > self.model.shape.block_size else len(self.model.tokenizer.encode(text))

    def _encode(self, text: str) -> list[int]:
        """The ids. InputError for what is too long whatever its tokens are: it is not worth encoding."""
        block_size = self.model.shape.block_size
        if self.longest and len(text.encode()) > self.longest * block_size:
            raise TooLong(f"The prompt has {len(text):,} characters; the model's block has {block_size} tokens.")
        ids = self.model.encode(text)
        if len(ids) > block_size:
            raise TooLong(f"The prompt has {len(ids):,} tokens; the model's block has {block_size}.")
        return ids

    def step(self) -> list[dict[str, Any]]:
        """One token more of every text."""
        if not self.texts:
            return []
        try:
            pieces = self.writer.step()
        except NonFinite as error:  # all of them are in doubt
            why = {"refused": str(error), "status": 500, "code": NOT_FINITE}
            refused = [{"id": text.id, **why} for text in self.texts.values()]
            for number in self.texts:
                self.writer.cancel(number)
            self.texts.clear()
            return refused
        return [self._told(piece) for piece in pieces if piece.text_id in self.texts]

    def _told(self, piece: Piece) -> dict[str, Any]:
        text = self.texts.pop(piece.text_id) if piece.ended else self.texts[piece.text_id]
        eot = self.model.tokenizer.eot
        told: dict[str, Any] = {"id": text.id, "text": piece.text, "new": sum(t.token != eot for t in piece.tokens)}
        if text.places:
            if piece.prompt is not None:
                told["scored_prompt"] = [self._scored(scored, text.places.of(scored.token)) for scored in piece.prompt]
                text.places.end()  # what is written begins a character of its own
            told["scored"] = [
                self._scored(scored, text.places.end() if scored.token == eot else text.places.of(scored.token))
                for scored in piece.tokens
            ]
        if piece.ended:
            told["ended"] = piece.ended
        return told

    def _scored(self, scored: Scored, place: int) -> list[Any]:
        top = [[self._name(token), max(logprob, LEAST)] for token, logprob in scored.top]
        logprob = None if scored.logprob is None else max(scored.logprob, LEAST)
        return [self._name(scored.token), logprob, top, place]

    def _name(self, token: int) -> str | None:
        tokenizer = self.model.tokenizer
        return None if token == tokenizer.eot else tokenizer.token_piece(token).decode("latin-1")

    def cancel(self, id: int) -> None:
        for number, text in self.texts.items():
            if text.id == id:
                self.writer.cancel(number)
                del self.texts[number]
                return


class TooLong(InputError):
    """A prompt that does not fit into the block."""


class Inference:
    """Obeys what comes over the socket between steps."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.services: list[Service] = []
        self._unread = b""

    def say(self, message: Any) -> None:
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def serve(self) -> None:
        """Until the parent closes its end."""
        lines = self.read(wait=True)
        if not lines:
            return
        order = json.loads(lines[0])
        try:
            for run, checkpoint in order["runs"]:
                self.services.append(Service.of(run, checkpoint, order["slots"], order["dtype"], order["threads"]))
                self.say({"loaded": self.services[-1].about})
        except SpheresError as error:
            self.say({"failed": str(error)})
            return
        orders: deque[bytes] = deque()
        while (lines := self.read(wait=not orders and not any(service.texts for service in self.services))) is not None:
            orders += lines
            self.obey_some(orders)
            if told := [event for service in self.services for event in service.step()]:
                self.say(told)

    def obey_some(self, orders: deque[bytes]) -> None:
        """Take orders for a moment: long prompts do not keep the texts of others waiting until all are encoded."""
        until = time.monotonic() + ORDERS_S
        while orders:
            if told := self.obey(json.loads(orders.popleft())):
                self.say(told)
            if time.monotonic() > until:
                return

    def read(self, wait: bool) -> list[bytes] | None:
        """The lines that have come; with `wait` at least one. None where the parent has gone."""
        lines: list[bytes] = []
        while select.select([self.connection], [], [], None if wait and not lines else 0)[0]:
            data = self.connection.recv(READ_BYTES)
            if not data:
                return None
            *more, self._unread = (self._unread + data).split(b"\n")
            lines += more
        return lines

    def obey(self, order: dict[str, Any]) -> list[dict[str, Any]]:
        if "cancel" in order:
            for service in self.services:
                service.cancel(order["cancel"])
            return []
        try:
            return [self.services[order["model"]].begin(order)]
        except InputError as error:
            code = "context_length_exceeded" if isinstance(error, TooLong) else None
            return [{"id": order["begin"], "refused": str(error), "status": 400, "code": code}]


def main() -> None:
    """The child's process."""
    die_with(int(sys.argv[2]))
    ignore_signals()
    os.nice(NICE)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the parent is gone, and so are we
        Inference(socket.socket(fileno=int(sys.argv[1]))).serve()
    sys.stderr.flush()
    os._exit(0)  # a writer's threads need not be waited for


if __name__ == "__main__":
    main()
