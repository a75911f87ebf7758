"""The body of a request -> an order: every value checked and bounded, nothing ignored that would change the text."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from cllm_spheres.errors import nearest, shown
from cllm_spheres.web.fields import Fields, well_formed
from cllm_spheres.web.refusals import Refused, bad

MOST_STOPS, STOP_CHARACTERS = 4, 256
MOST_LOGPROBS = 20
MOST_MESSAGES = 1024
MOST_SEED = 2**63 - 1
COMPLETION_TOKENS, CHAT_TOKENS = 16, 256  # where a request does not say; 16 is OpenAI's
NAME_CHARACTERS = 256
_HINTS = {
    "frequency_penalty": "repetition_penalty is there.",
    "presence_penalty": "repetition_penalty is there.",
    "suffix": "The model writes on, it does not fill in.",
    "reasoning_effort": "The model does not reason.",
}
_PENALTIES: dict[str, tuple[Any, ...]] = {"frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},)}
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "service_tier": ("auto", "default"),
    "audio": (), "prediction": (), "reasoning_effort": ("none",), "verbosity": (), "web_search_options": (),
}  # fmt: skip
_HARMLESS = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    tokens: int = 4096  # new ones, of each text
    texts: int = 128  # prompts x n
    scores: int = 1 << 18  # tokens of all texts x (1 + logprobs): what an answer may have to hold
    body_bytes: int = 1 << 20
    seconds: float = 600.0  # from the whole request to the end of its answer, the wait in the queue included


@dataclass(frozen=True)
class Order:
    """A request that can be obeyed. Of a chat `messages` are given, else `prompts`: texts or lists of token ids."""

    model: str
    options: dict[str, Any]  # of inference's Options
    prompts: tuple[str | list[int], ...] = ()
    messages: tuple[dict[str, str], ...] = ()
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    chat: bool = False
    logprobs: int | None = None

    @property
    def texts(self) -> list[tuple[Any, int]]:
        """(prompt, sample) of each text, in the order of the choices; a chat's prompt is None."""
        prompts = self.prompts or (None,)
        return [(prompt, sample) for prompt in prompts for sample in range(self.n)]


def completion(body: dict[str, Any], models: tuple[str, ...], limits: Limits) -> Order:
    """The order of /v1/completions."""
    fields = Fields(body)
    model = _model(fields, models)
    prompts = _prompts(fields)
    echo = fields.flag("echo")
    logprobs = fields.whole("logprobs", 0, MOST_LOGPROBS, None)
    tokens = fields.whole("max_tokens", 0, limits.tokens, min(COMPLETION_TOKENS, limits.tokens))
    if tokens == 0 and not echo:
        raise bad("max_tokens 0 writes nothing: it needs echo.", "max_tokens")
    n = _count(fields, len(prompts), limits)
    best_of = fields.whole("best_of", 1, limits.texts, n)
    if best_of != n:
        raise bad(
            f"best_of {best_of} is not supported: leave it out, or give n, {n}.", "best_of", "unsupported_parameter"
        )
    options = _options(fields, tokens, logprobs)
    options["score_prompt"] = echo and (logprobs is not None or tokens == 0)
    scored = n * sum(map(len, prompts)) if options["score_prompt"] else 0
    _bounded(n * len(prompts) * tokens + scored, logprobs, limits)
    stream, include_usage = _stream(fields)
    fields.unsupported({**_PENALTIES, "suffix": ("",)}, _HINTS)
    fields.harmless("user")
    fields.nothing_else()
    return Order(
        model, options, tuple(prompts), n=n, stream=stream, include_usage=include_usage, echo=echo, logprobs=logprobs
    )


def chat(body: dict[str, Any], models: tuple[str, ...], limits: Limits) -> Order:
    """The order of /v1/chat/completions."""
    fields = Fields(body)
    model = _model(fields, models)
    messages = _messages(fields)
    wanted = fields.flag("logprobs")
    top = fields.whole("top_logprobs", 0, MOST_LOGPROBS, None)
    if top is not None and not wanted:
        raise bad("top_logprobs needs logprobs: true.", "top_logprobs")
    logprobs = (top or 0) if wanted else None
    tokens = fields.whole("max_tokens", 1, limits.tokens, None)
    newer = fields.whole("max_completion_tokens", 1, limits.tokens, None)
    if tokens is not None and newer is not None and tokens != newer:
        raise bad(f"max_tokens is {tokens} and max_completion_tokens {newer}: give one.", "max_completion_tokens")
    n = _count(fields, 1, limits)
    tokens = tokens or newer or min(CHAT_TOKENS, limits.tokens)
    _bounded(n * tokens, logprobs, limits)
    options = _options(fields, tokens, logprobs) | {"score_prompt": False}
    stream, include_usage = _stream(fields)
    fields.unsupported({**_PENALTIES, **_UNSUPPORTED}, _HINTS)
    fields.harmless(*_HARMLESS, "parallel_tool_calls")
    fields.nothing_else()
    return Order(
        model, options, messages=messages, n=n, stream=stream, include_usage=include_usage, chat=True, logprobs=logprobs
    )


def _model(fields: Fields, models: tuple[str, ...]) -> str:
    name = fields.string("model", NAME_CHARACTERS)
    if name is None:
        raise bad(f"model is missing: {nearest('', models)}", "model")
    if name not in models:
        raise no_model(name, models)
    return name


def no_model(name: str, models: tuple[str, ...]) -> Refused:
    """404: which one is meant."""
    message = f"There is no model {shown(name)}: {nearest(name[:NAME_CHARACTERS], models)}"
    return Refused(404, message, param="model", code="model_not_found")


def _count(fields: Fields, num_prompts: int, limits: Limits) -> int:
    n = fields.whole("n", 1, limits.texts, 1)
    if n * num_prompts > limits.texts:
        message = f"{num_prompts} prompts of n = {n} are {n * num_prompts} texts: at most {limits.texts} in a request."
        raise bad(message, "n" if num_prompts == 1 else "prompt")
    return n


def _bounded(tokens: int, logprobs: int | None, limits: Limits) -> None:
    """Refused where an answer could become too large to hold for a client that does not read it."""
    scores, most = tokens * (1 + (logprobs or 0)), max(limits.scores, limits.tokens)
    if scores > most:
        what = f"{tokens:,} tokens of all texts x (1 + logprobs) are {scores:,}"
        raise bad(f"{what}: at most {most:,} are allowed in a request.", "max_tokens")


def _options(fields: Fields, tokens: int, logprobs: int | None) -> dict[str, Any]:
    top_p = fields.number("top_p", 0, 1, 1.0)
    return {
        "tokens": tokens,
        "temperature": fields.number("temperature", 0, 2, 1.0),
        "top_k": fields.whole("top_k", 1, 1 << 31, None),
        "top_p": None if top_p == 1 else top_p or 1e-9,  # 0: the likeliest alone
        "min_p": fields.number("min_p", 0, 1, None) or None,
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 100, 1.0),
        "stop": _stops(fields),
        "seed": fields.whole("seed", 0, MOST_SEED, secrets.randbelow(MOST_SEED)),
        "logprobs": logprobs,
    }


def _stops(fields: Fields) -> list[str]:
    value = fields.take("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise bad("stop must be a string or an array of strings.", "stop")
    if len(stops) > MOST_STOPS:
        raise bad(f"stop has {len(stops)} strings: at most {MOST_STOPS} are allowed.", "stop")
    for stop in stops:
        if not 1 <= len(stop) <= STOP_CHARACTERS:
            raise bad(f"A stop string has {len(stop):,} characters: give 1 to {STOP_CHARACTERS}.", "stop")
        well_formed(stop, "stop")
    return stops


def _stream(fields: Fields) -> tuple[bool, bool]:
    """(stream, include_usage)."""
    stream, options = fields.flag("stream"), fields.take("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise bad("stream_options needs stream: true.", "stream_options")
    if not isinstance(options, dict):
        raise bad("stream_options must be an object.", "stream_options")
    inside = Fields(options)
    include_usage = inside.flag("include_usage")
    inside.harmless("include_obfuscation")
    inside.nothing_else()
    return stream, include_usage


def _prompts(fields: Fields) -> list[str | list[int]]:
    """A text, token ids, or an array of either -> a list of prompts."""
    value = fields.take("prompt")
    if value is None:
        return [""]
    if isinstance(value, str):
        return [well_formed(value, "prompt")]
    if not isinstance(value, list) or not value:
        raise bad("prompt must be a string, token ids, or a filled array of either.", "prompt")
    if all(type(item) is int for item in value):
        return [_ids(value)]
    if all(isinstance(item, str) for item in value):
        return [well_formed(item, "prompt") for item in value]
    if all(isinstance(item, list) and all(type(i) is int for i in item) for item in value):
        return [_ids(item) for item in value]
    raise bad("prompt must hold strings only, or whole numbers only, or arrays of whole numbers only.", "prompt")


def _ids(ids: list[int]) -> list[int]:
    if not ids:
        raise bad("A prompt of token ids is empty.", "prompt")
    return ids


def _messages(fields: Fields) -> tuple[dict[str, str], ...]:
    """[{"role", "content"}] -> the same with plain text; developer is system, as OpenAI has it."""
    value = fields.take("messages")
    if not isinstance(value, list) or not value:
        raise bad("messages must be an array with at least one message.", "messages")
    if len(value) > MOST_MESSAGES:
        raise bad(f"messages has {len(value):,}: at most {MOST_MESSAGES:,} are allowed.", "messages")
    return tuple(_message(item, number) for number, item in enumerate(value))


def _message(item: Any, number: int) -> dict[str, str]:
    where = f"messages[{number}]"
    if not isinstance(item, dict):
        raise bad(f"{where} must be an object.", where)
    inside = Fields(item)
    role = inside.string("role", NAME_CHARACTERS)
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant"):
        known = nearest((role or "")[:60], ("system", "developer", "user", "assistant"))
        raise bad(f"{where} has the role {shown(role)}: {known}", f"{where}.role")
    content = inside.take("content")
    inside.unsupported({"name": (), "tool_calls": ([],), "function_call": (), "audio": (), "refusal": ()}, {})
    inside.nothing_else()
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise bad(f"{where}.content must be a string, or an array of text parts.", f"{where}.content")
    return {"role": role, "text": "".join(_part(part, f"{where}.content") for part in parts)}


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text":
        part = part["text"]
    if not isinstance(part, str):
        raise bad(f"{where} may hold text only.", where)
    return well_formed(part, where)
