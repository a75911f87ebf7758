"""Messages of a dialogue -> the text that stands for it, in training and in `chat` and `serve` alike.

Turns are written as a play would be:

    What the system says.

    User: the first question
    Assistant: the first answer
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cllm_spheres.errors import InputError, nearest, shown

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = (SYSTEM, USER, ASSISTANT)
SPEAKERS = {USER: "User", ASSISTANT: "Assistant"}
_PAIR = (("prompt", USER), ("completion", ASSISTANT))  # the fields of a record that is one turn and its answer


@dataclass(frozen=True)
class Message:
    """What one of ROLES said."""

    role: str
    text: str


def turns(messages: Iterable[Message]) -> str:
    """All messages as text, what the system said first. InputError for an unknown role."""
    system, said = [], []
    for message in messages:
        if message.role not in ROLES:
            raise InputError(f"There is no role {shown(message.role)}: {nearest(message.role, ROLES)}")
        text = message.text.strip()
        if message.role == SYSTEM:
            system.append(text + "\n\n")
        else:
            said.append(f"{SPEAKERS[message.role]}: {text}\n")
    return "".join(system) + "".join(said)


def is_dialogue(record: dict[str, Any]) -> bool:
    """Whether a .jsonl object has the fields of one: "messages", or "prompt" and "completion"."""
    return "messages" in record or all(name in record for name, _ in _PAIR)


def dialogue_of(record: dict[str, Any]) -> str | None:
    """The text of such an object; None where a role or a content is of another kind than text."""
    if "messages" in record:
        messages = record["messages"]
    else:
        messages = []
        for name, role in _PAIR:
            value = record[name]
            messages += value if isinstance(value, list) else [{"role": role, "content": value}]
    if not isinstance(messages, list) or not messages:
        return None
    read = list(map(_message, messages))
    return None if None in read else turns(filter(None, read))


def _message(value: Any) -> Message | None:
    if not isinstance(value, dict):
        return None
    role = SYSTEM if value.get("role") == "developer" else value.get("role")
    content = value.get("content")
    if isinstance(content, list):  # parts of a message, as OpenAI's clients write them
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "\n".join(texts) if len(texts) == len(parts) else None
    return Message(role, content) if role in ROLES and isinstance(content, str) else None
