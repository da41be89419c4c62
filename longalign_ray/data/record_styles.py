"""Record styles: how the published corpora write a conversation down, told apart by the keys of the record.

    messages           {"messages": [{"role", "content"}, ...], "tools": [...]}
    sharegpt           {"conversations": [{"from", "value"}, ...], "system": ..., "tools": ...}
    alpaca             {"instruction", "input", "output", "system", "history": [[question, answer], ...]}
    prompt_completion  {"prompt", "completion"}, either one text or a list of messages
    text               {"text"}: a document to continue, for continual pre-training

`auto` takes the first style of this order whose keys are there, record by record.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from longalign_ray.config import Style

Record = dict[str, Any]

MAX_DETAIL_CHARS = 300
ASKING_ROLES = ("system", "user", "human", "tool", "observation")

# Per style what it needs: one key of every group. A key that holds null counts as absent, as Parquet fills in nulls.
KEYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (("conversations", "conversation"),),
    "alpaca": (("instruction",), ("output", "response")),
    "prompt_completion": (("prompt",), ("completion", "response", "chosen")),
    "text": (("text",),),
}
KNOWN_STYLES = ", or ".join(" and ".join(repr(group[0]) for group in groups) for groups in KEYS.values())
OPTIONAL_KEYS = ("id", "tools", "system", "input", "context", "history", "chosen")
ALL_KEYS = (*sorted({key for groups in KEYS.values() for group in groups for key in group}), *OPTIONAL_KEYS)


class RecordError(ValueError):
    """A record that is no conversation; `reason` is the short name under which it is counted.

    The detail is kept printable and short, whatever the record holds.
    """

    def __init__(self, reason: str, detail: str):
        detail = printable(detail)
        if len(detail) > MAX_DETAIL_CHARS:
            detail = f"{detail[: MAX_DETAIL_CHARS - 3]}..."
        super().__init__(reason, detail)
        self.reason = reason

    def __str__(self) -> str:
        return self.args[1]


@dataclass(frozen=True, slots=True)
class RecordParts:
    """A record taken apart, its values not yet checked: turns with role and content, or a text."""

    turns: list[Any]
    tools: Any = None
    text: Any = None


def take_apart(record: Any, style: Style) -> RecordParts:
    """The turns of a record of the given style. Raises RecordError `not_an_object` and `unknown_style`."""
    if not isinstance(record, dict):
        raise RecordError("not_an_object", f"a {type(record).__name__}, and a record is a JSON object")
    if style == "auto":
        name = next((name for name in KEYS if _fits(record, name)), None)
        if name is None:
            raise RecordError("unknown_style", f"{_seen(record)}{_almost(record)}. A record has {KNOWN_STYLES}")
    elif not _fits(record, style):
        raise RecordError("unknown_style", f"corpus.style = {style} needs {_needs(style)}; {_seen(record)}")
    else:
        name = style
    return _TAKE_APART[name](record)


def first_of(record: Record, *keys: str) -> Any:
    """The first of the keys' values that is there: neither null nor the NaN that tables write for it."""
    for key in keys:
        value = record.get(key)
        if value is not None and value == value:
            return value
    return None


def near_match(names: Iterable[Any], known: Iterable[str]) -> str:
    """`; did you mean 'messages' for 'mesages'?` for the first name that is close to a known one, else nothing."""
    known = list(known)
    for name in names:
        if isinstance(name, str) and name not in known and len(name) < 100:
            for close in difflib.get_close_matches(name.strip().lower(), known, n=1, cutoff=0.75):
                return f"; did you mean {close!r} for {name!r}?"
    return ""


def printable(text: str) -> str:
    """The text with halves of surrogate pairs, which no file can hold, written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _fits(record: Record, style: str) -> bool:
    return all(first_of(record, *group) is not None for group in KEYS[style])


def _needs(style: str) -> str:
    return " and ".join(" or ".join(repr(key) for key in group) for group in KEYS[style])


def _almost(record: Record) -> str:
    """What the record lacks of a style of which it has a part."""
    for name, groups in KEYS.items():
        lacking = [group for group in groups if first_of(record, *group) is None]
        if 0 < len(lacking) < len(groups):
            return f"; {name} needs {' or '.join(map(repr, lacking[0]))} as well"
    return ""


def _seen(record: Record) -> str:
    keys = [str(key)[:40] for key in list(record)[:12]]
    more = f" and {len(record) - 12} more" if len(record) > 12 else ""
    return f"the record has the keys {', '.join(map(repr, keys)) or '(none)'}{more}{near_match(keys, ALL_KEYS)}"


def _chat(record: Record) -> RecordParts:
    turns = first_of(record, "messages", "conversations", "conversation")
    if not isinstance(turns, list) or not turns:
        raise RecordError("no_messages", f"needs a list of messages, not {_kind(turns)}")
    # A preference record: the chosen answer belongs at the end, unless it is there already.
    answer = _answer(first_of(record, "chosen")) if _role(turns[-1]) in ASKING_ROLES else []
    return RecordParts([*_system(record), *turns, *answer], first_of(record, "tools"))


def _alpaca(record: Record) -> RecordParts:
    question = _text(record, "instruction")
    if context := _text(record, "input", "context"):
        question = f"{question}\n\n{context}"
    history = first_of(record, "history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise RecordError("bad_history", "the history of an instruction is a list of pairs [question, answer]")
    turns = [
        {"role": role, "content": content}
        for pair in history
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    answer = _answer(first_of(record, "output", "response"))
    return RecordParts(
        [*_system(record), *turns, {"role": "user", "content": question}, *answer], first_of(record, "tools")
    )


def _prompt_completion(record: Record) -> RecordParts:
    """A prompt that is a list of messages is context alone: only the completion is learnt."""
    prompt, answer = record["prompt"], _answer(first_of(record, *KEYS["prompt_completion"][1]))
    if answer and _role(answer[0]) in ASKING_ROLES:
        prompt = []  # some preference corpora repeat the prompt in the answer
    elif isinstance(prompt, list):
        prompt = [_without_loss(turn) for turn in prompt]
    else:
        prompt = [{"role": "user", "content": prompt}]
    return RecordParts([*_system(record), *prompt, *answer], first_of(record, "tools"))


def _document(record: Record) -> RecordParts:
    return RecordParts([], text=record["text"])


_TAKE_APART: dict[str, Callable[[Record], RecordParts]] = {
    "messages": _chat,
    "sharegpt": _chat,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _document,
}


def _system(record: Record) -> list[Any]:
    system = first_of(record, "system")
    return [] if system is None or system == "" else [{"role": "system", "content": system}]


def _role(turn: Any) -> Any:
    return first_of(turn, "role", "from") if isinstance(turn, dict) else None


def _without_loss(turn: Any) -> Any:
    """The turn with weight 0 unless it has one of its own."""
    if not isinstance(turn, dict) or first_of(turn, "loss_weight", "weight") is not None:
        return turn
    return {**turn, "loss_weight": 0.0}


def _answer(value: Any) -> list[Any]:
    """The turns of an answer: a text, one message, or a list of them."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return value
    if isinstance(value, dict):
        return [value]
    return [] if value is None else [{"role": "assistant", "content": value}]


def _text(record: Record, *keys: str) -> str:
    value = first_of(record, *keys)
    if value is not None and not isinstance(value, str):
        raise RecordError("no_text", f"{' or '.join(map(repr, keys))} is {_kind(value)}, not text")
    return value or ""


def _kind(value: Any) -> str:
    """`a str`, `a list of 3`, for messages about values that may be very large."""
    size = f" of {len(value)}" if isinstance(value, list | dict | str) else ""
    return f"a {type(value).__name__}{size}"
