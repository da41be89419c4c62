"""Conversations: the unit of a corpus, and the rules that a record must keep to be one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from longalign_ray.config import Style
from longalign_ray.data.record_styles import RecordError, first_of, near_match, printable, take_apart

__all__ = ["Conversation", "Message", "RecordError", "decode_record", "parse_record"]

RoleOrder = Literal["alternate", "any"]
MAX_ID_CHARS = 200
MAX_DEPTH = 50  # of tools and calls, which templates and encoders walk through recursively

# Every name that corpora give a role -> ours. `call` is an assistant's turn whose content is a tool call.
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
# What may follow a role in an ordinary conversation. An assistant may also go on after its own tool call.
FOLLOWS = {
    "": ("system", "user"),
    "system": ("system", "user"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant", "user"),
}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: str
    """`system`, `user`, `assistant` or `tool`."""
    content: str
    loss_weight: float | None = None
    """Weight of this turn's tokens in the loss, in steps of 0.01; None: as the recipe says for the role."""
    tool_calls: tuple[dict[str, Any], ...] = ()
    """Calls of an assistant's turn: {"type": "function", "function": {"name": str, "arguments": dict}}, maybe "id"."""
    tool_call_id: str | None = None
    """The call that a `tool` turn answers."""
    name: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The form that chat templates take."""
        rest = {"tool_calls": list(self.tool_calls), "tool_call_id": self.tool_call_id, "name": self.name}
        return {"role": self.role, "content": self.content} | {key: value for key, value in rest.items() if value}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A list of messages with a name (`example_id`, unique in a corpus) and where it came from (`source`)."""

    example_id: str
    messages: tuple[Message, ...]
    source: str
    tools: tuple[dict[str, Any], ...] = ()
    """What the assistant may call: {"type": "function", "function": {"name", "description", "parameters"}}."""
    text: str | None = None
    """A document instead of messages, without a template: every token of it is a target."""

    def as_dicts(self) -> list[dict[str, Any]]:
        """The form that chat templates and the wire take."""
        return [message.as_dict() for message in self.messages]


def decode_record(line: bytes) -> Any:
    """The JSON value of one line. Raises RecordError `not_utf8`, `broken_json` or `too_deep`."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RecordError("not_utf8", f"not valid UTF-8 at byte {error.start}: {error.reason}") from error
    except ValueError as error:
        raise RecordError("broken_json", f"not valid JSON: {error}") from error
    except RecursionError as error:
        raise RecordError("too_deep", "the JSON is nested too deeply") from error


def parse_record(
    record: Any, *, source: str, line_number: int, style: Style = "auto", role_order: RoleOrder = "alternate"
) -> Conversation:
    """The conversation that a decoded record of any known style holds.

    Raises RecordError where the record has no known style, a role is unknown, a content no text, an assistant's turn
    empty, a weight outside [0, 1], a tool call no object, nothing there to learn, or, with `alternate`, where a turn
    follows one that it cannot answer. A record that is a RecordError, as `read_records` gives what it cannot decode, is
    raised.
    """
    if isinstance(record, RecordError):
        raise record
    try:
        parts = take_apart(record, style)
        name = _example_id(record.get("id"), f"{source}:{line_number}")
        if parts.text is not None:
            return Conversation(name, (), source, text=_document(parts.text))
        messages = tuple(_message(item, number) for number, item in enumerate(parts.turns))
        tools = _tools(parts.tools)
    except RecursionError as error:
        raise RecordError("too_deep", "the record is nested too deeply") from error
    if not any(message.role == "assistant" or message.loss_weight for message in messages):
        raise RecordError("no_assistant_turn", "no message has the role 'assistant', so there is nothing to learn")
    if role_order == "alternate":
        _check_order(messages)
    return Conversation(name, messages, source, tools)


def _example_id(value: Any, otherwise: str) -> str:
    """The record's own name where it is a short text or number."""
    if isinstance(value, str) and 0 < len(value) <= MAX_ID_CHARS:
        return printable(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**MAX_ID_CHARS:
        return str(value)
    return printable(otherwise)


def _document(value: Any) -> str:
    text = _content(value, "the text")
    if not text.strip():
        raise RecordError("empty_text", "the text is empty")
    return text


def _message(item: Any, number: int) -> Message:
    if not isinstance(item, dict):
        raise RecordError("no_messages", f"message {number} is a {type(item).__name__}, not an object")
    place = f"message {number}"
    name = first_of(item, "role", "from")
    if name is None:
        hint = near_match(item, ("role", "content", "from", "value"))
        raise RecordError(
            "no_role", f"{place} has no 'role' or 'from' but {', '.join(map(repr, list(item)[:8]))}{hint}"
        )
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        hint = near_match([name], ROLES)
        raise RecordError("unknown_role", f"{place} has the role {name!r}{hint}; known roles: {', '.join(ROLES)}")
    value = first_of(item, "content", "value")
    calls = _tool_calls(value, place) if role == "call" else ()
    if given := first_of(item, "tool_calls", "function_call"):
        calls += _tool_calls(given, place)
    content = "" if role == "call" or (value is None and calls) else _content(value, place)
    if role in ("assistant", "call"):
        role = "assistant"
        if not content.strip() and not calls:
            raise RecordError("empty_assistant_turn", f"{place}: the assistant says nothing")
    elif calls:
        raise RecordError("bad_tool_call", f"{place}: only the assistant calls tools, not the role {name!r}")
    return Message(
        role,
        content,
        loss_weight=_loss_weight(first_of(item, "loss_weight", "weight"), place),
        tool_calls=calls,
        tool_call_id=_label(item.get("tool_call_id")),
        name=_label(item.get("name")),
    )


def _content(value: Any, place: str) -> str:
    """The text of a content: a string, or a list of {"type": "text", "text": ...}, joined."""
    if isinstance(value, list):
        parts = []
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise RecordError("not_text", f"{place} has a part of type {kind!r}; only text can be learnt")
            parts.append(part["text"])
        value = "".join(parts)
    if not isinstance(value, str):
        raise RecordError("no_text", f"{place} has a content of type {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(
            "lone_surrogate", f"{place} holds half of a surrogate pair at character {error.start}, which is no text"
        ) from error
    return value


def _loss_weight(value: Any, place: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise RecordError("bad_loss_weight", f"{place} has the loss weight {value!r}; it lies in [0, 1]")
    if abs(value * 100 - round(value * 100)) > 1e-6:
        raise RecordError("bad_loss_weight", f"{place} has the loss weight {value!r}; weights go in steps of 0.01")
    return round(value * 100) / 100


def _tool_calls(value: Any, place: str) -> tuple[dict[str, Any], ...]:
    """OpenAI's form of a call or a list of calls; arguments as an object, which is what chat templates take."""
    value = _decoded(value, "bad_tool_call", f"{place}: a tool call")
    return tuple(_tool_call(call, place) for call in (value if isinstance(value, list) else [value]))


def _tool_call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RecordError("bad_tool_call", f'{place}: a tool call is {{"name": ..., "arguments": {{...}}}}')
    arguments = _decoded(
        first_of(function, "arguments", "parameters") or {}, "bad_tool_call", f"{place}: the arguments"
    )
    if not isinstance(arguments, dict):
        raise RecordError("bad_tool_call", f"{place}: the arguments of a call are a {type(arguments).__name__}")
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return made | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    """OpenAI's form of the tools: a list, or its JSON text, of functions, bare or as {"type", "function"}."""
    if value is None:
        return ()
    tools = _decoded(value, "bad_tools", "'tools'") or []
    if not isinstance(tools, list):
        tools = [tools]
    for tool in tools:
        if not isinstance(tool, dict) or not isinstance(tool.get("function", tool), dict):
            raise RecordError("bad_tools", f"'tools' holds a {type(tool).__name__}, and a tool is an object")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def _decoded(value: Any, reason: str, place: str) -> Any:
    """The value, decoded where it is JSON text, and sure to be writable as JSON again."""
    try:
        if isinstance(value, str):
            value = json.loads(value) if value.strip() else {}
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode("utf-8")
    except (ValueError, TypeError) as error:
        raise RecordError(reason, f"{place} cannot be read as JSON: {error}") from error
    if _is_deeper(value, MAX_DEPTH):
        raise RecordError("too_deep", f"{place} is nested more than {MAX_DEPTH} levels deep")
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    present = [value]
    for _ in range(levels):
        if not present:
            return False
        present = [
            inner
            for item in present
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return bool(present)


def _label(value: Any) -> str | None:
    return printable(value) if isinstance(value, str) and value else None


def _check_order(messages: Sequence[Message]) -> None:
    """Raises RecordError `role_order` at the first turn that cannot follow the one before."""
    before, called = "", False
    for number, message in enumerate(messages):
        if message.role not in FOLLOWS[before] and not (called and message.role == "assistant"):
            raise RecordError(
                "role_order",
                f"message {number} of the role {message.role!r} follows {before or 'nothing'}; "
                f"corpus.role_order=any lets it pass",
            )
        before, called = message.role, bool(message.tool_calls)
