"""Conversations: the unit of a corpus, and the rules that a record must keep to be one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A list of messages with a name (`example_id`, unique in a corpus) and where it came from (`source`)."""

    example_id: str
    messages: tuple[Message, ...]
    source: str

    def as_dicts(self) -> list[dict[str, str]]:
        """The form that chat templates and the wire take."""
        return [{"role": message.role, "content": message.content} for message in self.messages]


class RecordError(ValueError):
    """A record that is no conversation; `reason` is the short name under which it is counted."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def parse_record(line: str | bytes, *, source: str, line_number: int) -> Conversation:
    """The conversation on one JSONL line.

    Raises RecordError where the line is not JSON, not an object with a non-empty list `messages`, where a role is
    unknown, a content no text, an assistant turn empty, or no assistant turn present.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise RecordError("broken_json", f"not valid JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list) or not record["messages"]:
        raise RecordError("no_messages", 'needs {"messages": [{"role": ..., "content": ...}, ...]}')
    messages = tuple(_parse_message(item, number) for number, item in enumerate(record["messages"]))
    if not any(message.role == "assistant" for message in messages):
        raise RecordError("no_assistant_turn", "no message has the role 'assistant', so there is nothing to learn")
    return Conversation(str(record.get("id", f"{source}:{line_number}")), messages, source)


def _parse_message(item: Any, number: int) -> Message:
    if not isinstance(item, dict):
        raise RecordError("no_messages", f"message {number} is a {type(item).__name__}, not an object")
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        raise RecordError("unknown_role", f"message {number} has the role {role!r}; known roles: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise RecordError("no_text", f"message {number} has a content of type {type(content).__name__}, not text")
    if role == "assistant" and not content.strip():
        raise RecordError("empty_assistant_turn", f"message {number}: the assistant says nothing")
    return Message(role, content)
