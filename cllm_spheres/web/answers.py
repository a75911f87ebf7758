"""Events of an order's texts -> the JSON of OpenAI's completions and chat completions, whole or in chunks."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from cllm_spheres.inference.conversation import Lead
from cllm_spheres.text.tokenizer import EOT
from cllm_spheres.web.requests import Order

DONE = b"data: [DONE]\n\n"


@dataclass
class Choice:
    """One text: what has come of it."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    text: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    ended: str | None = None
    lead: Lead = field(default_factory=Lead)


class Answer:
    """What an order's answer is made of. `take` each event; then `whole`, or `chunks` after each."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.choices = [Choice() for _ in order.texts]
        self._head = {
            "id": ("chatcmpl-" if order.chat else "cmpl-") + secrets.token_hex(12),
            "object": "chat.completion" if order.chat else "text_completion",
            "created": int(time.time()), "model": order.model,
        }  # fmt: skip

    @property
    def complete(self) -> bool:
        """Whether all texts have ended."""
        return all(choice.ended for choice in self.choices)

    @property
    def usage(self) -> dict[str, int]:
        """A prompt counts once, however many samples go on from it."""
        prompt = sum(choice.prompt_tokens for choice in self.choices[:: self.order.n])
        new = sum(choice.new_tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def take(self, index: int, event: dict[str, Any], keep: bool) -> dict[str, Any] | None:
        """Count an event, keep what it brings for `whole`, or give it as a chunk's choice; None: it brings nothing."""
        choice, text, entries = self.choices[index], event.get("text", ""), []
        if "begun" in event:
            choice.prompt_tokens = event["begun"]
            text = event["prompt"]
        choice.new_tokens += event.get("new", 0)
        choice.ended = event.get("ended")
        if self.order.logprobs is not None:
            for scored in [*event.get("scored_prompt", ()), *event.get("scored", ())]:
                entries.append(_chat_entry(scored) if self.order.chat else _entry(scored))
        if self.order.chat:
            text = choice.lead.cut(text)
        if keep:
            choice.text.append(text)
            choice.logprobs += entries
            return None
        if "begun" in event and self.order.chat:
            return self._piece(index, {"role": "assistant", "content": ""}, [], None)
        if not (text or entries or choice.ended):
            return None
        return self._piece(index, {"content": text} if text else {}, entries, choice.ended, text)

    def _piece(
        self, index: int, delta: dict[str, Any], entries: list[dict[str, Any]], ended: str | None, text: str = ""
    ) -> dict[str, Any]:
        content = {"delta": delta} if self.order.chat else {"text": text}
        return {"index": index, **content, "logprobs": self._logprobs(entries), "finish_reason": ended}

    def whole(self) -> dict[str, Any]:
        """The answer that does not stream."""
        choices = []
        for index, choice in enumerate(self.choices):
            text = "".join(choice.text)
            message = {"role": "assistant", "content": text, "refusal": None}
            content = {"message": message} if self.order.chat else {"text": text}
            logprobs = self._logprobs(choice.logprobs, even_empty=True)
            choices.append({"index": index, **content, "logprobs": logprobs, "finish_reason": choice.ended})
        return {**self._head, "choices": choices, "usage": self.usage}

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        """A server-sent event."""
        kind = {"object": "chat.completion.chunk"} if self.order.chat else {}
        more = {"usage": usage} if self.order.include_usage else {}
        return sent_event({**self._head, **kind, "choices": choices, **more})

    def end(self) -> bytes:
        """What a stream ends with."""
        return (self.chunk([], self.usage) if self.order.include_usage else b"") + DONE

    def _logprobs(self, entries: list[dict[str, Any]], even_empty: bool = False) -> dict[str, Any] | None:
        if self.order.logprobs is None or not (entries or even_empty):
            return None
        if self.order.chat:
            return {"content": entries, "refusal": None}
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return {name: [entry[name] for entry in entries] for name in names}


def sent_event(value: Any) -> bytes:
    """JSON as one server-sent event."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def _name(piece: str | None) -> str:
    """A token as text; where it is no whole UTF-8, its bytes as OpenAI writes them: bytes:\\xc3."""
    if piece is None:
        return EOT
    data = piece.encode("latin-1")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _entry(scored: list[Any]) -> dict[str, Any]:
    """Of completions: the likeliest by name, the token itself among them; null where nothing comes before."""
    piece, logprob, top, place = scored
    likeliest = None if logprob is None else {_name(other): value for other, value in [*top, [piece, logprob]]}
    return {"tokens": _name(piece), "token_logprobs": logprob, "top_logprobs": likeliest, "text_offset": place}


def _chat_entry(scored: list[Any]) -> dict[str, Any]:
    piece, logprob, top, _ = scored
    return {**_described(piece, logprob), "top_logprobs": [_described(*other) for other in top]}


def _described(piece: str | None, logprob: float) -> dict[str, Any]:
    data = [] if piece is None else list(piece.encode("latin-1"))
    return {"token": _name(piece), "logprob": logprob, "bytes": data}
