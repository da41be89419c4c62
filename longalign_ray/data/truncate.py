"""Shorter conversations: what is cut out of the messages, before the template is rendered anew and thus stays whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from longalign_ray.data.conversation import Conversation, Message

Encode = Callable[[str], Any]
"""Text -> tokenizers.Encoding."""


def cut_left(conversation: Conversation, excess: int, *, num_tokens: int, encode: Encode) -> Conversation | None:
    """The conversation less about `excess` of its `num_tokens` tokens, or None where only the end is left to cut.

    Whole exchanges (a user's turn and what follows it) go first, the oldest first; then the beginning of the last
    user's message. System messages at the head, the last question's end and its answer stay.
    """
    messages = conversation.messages
    head = next((n for n, message in enumerate(messages) if message.role != "system"), len(messages))
    starts = [n for n, message in enumerate(messages) if n > head and message.role == "user"]
    if not starts:
        if head == len(messages) or messages[head].role != "user":
            return None
        return _with_shorter(conversation, head, lambda text: _without_tokens(text, 0, excess, encode))
    sizes = [len(encode(message.content)) for message in messages]
    # Tokens that the template adds to a message, estimated high: too few exchanges cut are followed by another cut.
    of_template = 1 + 5 * max(num_tokens - sum(sizes), 0) // (4 * len(messages))
    removed = 0
    for start, end in zip([head, *starts], starts, strict=False):
        removed += sum(sizes[start:end]) + of_template * (end - start)
        if removed >= excess:
            break
    return dataclasses.replace(conversation, messages=(*messages[:head], *messages[end:]))


def cut_middle(conversation: Conversation, excess: int, *, num_tokens: int, encode: Encode) -> Conversation | None:
    """The conversation less about `excess` tokens from the middle of its longest message that the model only reads (a
    user's or a tool's), of which head and tail stay; None where that message is not long enough."""
    read = [n for n, message in enumerate(conversation.messages) if message.role in ("user", "tool")]
    if not read:
        return None
    longest = max(read, key=lambda n: len(conversation.messages[n].content))
    kept = len(encode(conversation.messages[longest].content)) - excess
    return _with_shorter(conversation, longest, lambda text: _without_tokens(text, kept - kept // 2, excess, encode))


def _with_shorter(conversation: Conversation, number: int, cut: Callable[[str], str | None]) -> Conversation | None:
    messages = list(conversation.messages)
    text = cut(messages[number].content)
    if text is None:
        return None
    messages[number] = _with_content(messages[number], text)
    return dataclasses.replace(conversation, messages=tuple(messages))


def _with_content(message: Message, content: str) -> Message:
    return dataclasses.replace(message, content=content)


def _without_tokens(text: str, first: int, number: int, encode: Encode) -> str | None:
    """The text less `number` tokens from token `first` on, cut between characters; None if it has no more than that."""
    encoding = encode(text)
    if number >= len(encoding):
        return None
    start = encoding.token_to_chars(first)[0] if first else 0
    end = encoding.token_to_chars(first + number - 1)[1]
    return text[:start] + text[end:]


POLICIES: dict[str, Callable[..., Conversation | None]] = {"cut_left": cut_left, "cut_middle": cut_middle}
