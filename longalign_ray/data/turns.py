"""Where each turn stands in the text that a chat template makes of a conversation.

The template is also rendered with marks in place of the contents. The text between the marks is the template's own, so
what lies between it in the first rendering is what was said, whatever the template strips or adds:

    marked    <|user|>[0]<|assistant|>[1]<|end|><|user|>[2]<|assistant|>[3]<|end|>
    rendered  <|user|>Hi<|assistant|>Hello!<|end|><|user|>Bye<|assistant|>See you.<|end|>
    turns             ^^             ^^^^^^              ^^^             ^^^^^^^^

The marked rendering depends on the roles alone, is made once for all conversations with the same roles, and is proven
for each: its pieces and the contents, joined, are the rendered text. Where they are not, because the template looks at
the contents or there are tools, the conversation gets a marked rendering of its own, with marks for what the assistant
says alone; and a turn that the template writes in its own way (a call, a thought that it leaves out) is found as what a
rendering gains when that turn is added.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longalign_ray.data.conversation import Conversation, RecordError
from longalign_ray.data.template import Tokenizer

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a conversation, and for each message the [start, end) of its content in it, None where unknown.

    An assistant's turn starts where the template's cue to speak ends: all that follows the cue is for the model to
    write. Its place is always known.
    """

    text: str
    spans: tuple[Span | None, ...]


class TurnFinder:
    """Renders conversations with one tokenizer's template and finds their turns."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._pieces_of_roles: dict[tuple[str, ...], list[str] | None] = {}
        self._takes_tools: bool | None = None
        self._cue = self._cue_to_speak()
        self._special = re.compile("|".join(map(re.escape, special_tokens(tokenizer))) or "(?!)")

    def find(self, conversation: Conversation) -> Rendered:
        """Raises RecordError `template_refuses` where the template raises or has no place for tools,
        `template_drops_turn` where it leaves a message out, and `template_changes_turn` where what an assistant says is
        not found where the template puts it.
        """
        messages, tools = conversation.as_dicts(), list(conversation.tools) or None
        text = self._apply(messages, tools)
        if not tools and not any(message.tool_calls for message in conversation.messages):
            pieces = self._pieces(tuple(message.role for message in conversation.messages))
            if pieces is not None and (spans := self._match(text, pieces, messages, range(len(messages)))) is not None:
                return Rendered(text, tuple(spans))
        self._check_nothing_dropped(messages, tools)
        spoken = [n for n, m in enumerate(conversation.messages) if m.role == "assistant" and not m.tool_calls]
        pieces = _split_at_marks(self._apply(_marked(messages, spoken), tools), spoken)
        found = None if pieces is None else self._match(text, pieces, messages, spoken)
        spans = dict(zip(spoken, found, strict=True)) if found is not None else {}
        end = 0
        for number, message in enumerate(conversation.messages):
            if message.role == "assistant" and number not in spans:
                spans[number] = self._span_of_added_turn(text, messages, tools, number, after=end)
            end = spans[number][1] if number in spans else end
        return Rendered(text, tuple(spans.get(number) for number in range(len(messages))))

    def _pieces(self, roles: tuple[str, ...]) -> list[str] | None:
        """What the template writes between the contents of messages with these roles; None where it does not say."""
        if roles not in self._pieces_of_roles:
            numbers = range(len(roles))
            messages = _marked([{"role": role, "content": ""} for role in roles], numbers)
            try:
                pieces = _split_at_marks(self._apply(messages, None), numbers)
            except RecordError:
                pieces = None
            self._pieces_of_roles[roles] = pieces
        return self._pieces_of_roles[roles]

    def _match(
        self, text: str, pieces: list[str], messages: Sequence[dict[str, Any]], numbers: Sequence[int]
    ) -> list[Span] | None:
        """Spans of the contents of `numbers`, if these and the pieces between them, joined, are the text."""
        if not text.startswith(pieces[0]):
            return None
        spans: list[Span] = []
        position = len(pieces[0])
        for before, number, following in zip(pieces, numbers, pieces[1:], strict=False):
            content = messages[number]["content"]
            for said in (content, content.strip(), content.lstrip(), content.rstrip()):
                if text.startswith(following, position + len(said)) and text.startswith(said, position):
                    break
            else:
                return None
            start = position
            if self._cue and messages[number]["role"] == "assistant" and (cue := before.rfind(self._cue)) >= 0:
                start -= len(before) - cue - len(self._cue)
            position += len(said)
            spans.append((start, position))
            position += len(following)
        return spans if position == len(text) else None

    def _span_of_added_turn(
        self, text: str, messages: list[dict[str, Any]], tools: list[Any] | None, number: int, *, after: int
    ) -> Span:
        """The place of a turn that the template writes in its own way."""
        before = self._apply(messages[:number], tools, add_generation_prompt=True) if number else ""
        added = self._apply(messages[: number + 1], tools)
        if not added.startswith(before):
            raise _changed(number)
        turn = added[len(before) :]
        if text.startswith(before) and text.startswith(turn, len(before)):
            start = len(before)
        elif (place := text.find(turn, after)) >= 0:
            start = place
        elif text.startswith(before):  # another turn, as a thought may be left out once the talk goes on
            start = len(before)
            closing = self._special.search(text, start + 1)
            turn = text[start : closing.end() if closing else len(text)]
        else:
            raise _changed(number)
        said = turn.rstrip()
        for closing in self._special.finditer(said):
            if closing.end() == len(said) and closing.start() > 0:
                said = said[: closing.start()]
        message = messages[number]
        answer = message["content"].rpartition("</think>")[2].strip()
        names = [call["function"]["name"] for call in message.get("tool_calls", ())]
        if message.get("tool_calls") and not all(name in said for name in names):
            raise RecordError("template_drops_turn", f"the chat template leaves out the tool calls of message {number}")
        if not said or answer not in said:
            raise _changed(number)
        return start, start + len(said)

    def _check_nothing_dropped(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> None:
        if tools and self._takes_tools is None:
            self._takes_tools = self._uses_tools(tools)
        if tools and not self._takes_tools:
            raise RecordError("template_refuses", "the chat template has no place for the definitions of tools")
        given = [number for number, message in enumerate(messages) if message["role"] != "assistant"]
        text = self._apply(_marked(messages, given), tools)
        for number in given:
            if messages[number]["content"].strip() and _mark(number) not in text:
                role = messages[number]["role"]
                raise RecordError("template_drops_turn", f"the chat template leaves out message {number} ({role})")

    def _uses_tools(self, tools: list[Any]) -> bool:
        talk = [{"role": "user", "content": "Hi"}]
        try:
            return self._apply(talk, tools) != self._apply(talk, None)
        except RecordError:
            return True  # it looks at them; the conversation will show what it says

    def _cue_to_speak(self) -> str:
        talk = [{"role": "user", "content": "Hi"}]
        try:
            without, cued = self._apply(talk, None), self._apply(talk, None, add_generation_prompt=True)
        except RecordError:
            return ""
        return cued[len(without) :] if cued.startswith(without) else ""

    def _apply(
        self, messages: Sequence[dict[str, Any]], tools: list[Any] | None, *, add_generation_prompt: bool = False
    ) -> str:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, ValueError) as error:  # the latter two: a form that the template cannot take
            raise RecordError("template_refuses", f"the chat template refuses this conversation: {error}") from error


def special_tokens(tokenizer: Tokenizer) -> list[str]:
    """The tokens that stand for structure, not text, longest first."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *tokenizer.all_special_tokens}, key=lambda token: (-len(token), token))


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"


def _marked(messages: Sequence[dict[str, Any]], numbers: Sequence[int]) -> list[dict[str, Any]]:
    chosen = set(numbers)
    return [m | {"content": _mark(n)} if n in chosen else m for n, m in enumerate(messages)]


def _split_at_marks(marked: str, numbers: Sequence[int]) -> list[str] | None:
    """The pieces between the marks, if these are all there, once and in order."""
    pieces = []
    for number in numbers:
        piece, found, marked = marked.partition(_mark(number))
        if not found:
            return None
        pieces.append(piece)
    return [*pieces, marked]


def _changed(number: int) -> RecordError:
    return RecordError("template_changes_turn", f"the chat template alters what the assistant says in message {number}")
