"""Conversations to examples: token ids with exactly the assistant's tokens and its end-of-turn token as targets.

The chat template is rendered twice: once as it is, and once with every assistant turn replaced by a mark. The text
between the marks is the template's own, so what lies between it in the first rendering is what the assistant says,
whatever the template strips or adds:

    marked    <|user|>Hi<|assistant|>[0]<|end|><|user|>Bye<|assistant|>[1]<|end|>
    rendered  <|user|>Hi<|assistant|>Hello!<|end|><|user|>Bye<|assistant|>See you.<|end|>
    targets                          ^^^^^^^^^^^^^                        ^^^^^^^^^^^^^^^
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from longalign_ray.data.conversation import Conversation, RecordError
from longalign_ray.data.store import FULL_WEIGHT, Example
from longalign_ray.data.template import Tokenizer

Span = tuple[int, int]


def tokenize_conversation(
    conversation: Conversation, tokenizer: Tokenizer, *, max_length: int, too_long: Literal["reject", "cut_right"]
) -> tuple[Example, int]:
    """The example and the number of tokens that were cut from its end.

    A turn's targets run from its first token to the first special token after it, that one included; where a template
    closes the last turn with no special token, the tokenizer's EOS is appended, so that the model learns to stop.
    Raises RecordError `too_long` where the example has more than max_length tokens and they are not to be cut,
    `no_target_left` where the cut left none, and what `render` raises.
    """
    text, turns = render(tokenizer, conversation.as_dicts())
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.asarray(encoding["input_ids"], dtype=np.int32)
    starts, ends = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    is_special = np.isin(ids, special_ids(tokenizer))
    loss_mask = np.zeros(len(ids), dtype=np.bool_)
    limits = [start for start, _ in turns[1:]] + [len(text)]
    closed = True
    for (start, end), limit in zip(turns, limits, strict=True):
        first = int(np.searchsorted(ends, start, side="right"))  # the first token that reaches into the turn
        last = int(np.searchsorted(starts, end, side="left"))  # the first token past it
        closing = np.flatnonzero(is_special[last:] & (starts[last:] < limit))
        closed = len(closing) > 0
        loss_mask[first : last + closing[0] + 1 if closed else last] = True
    if not closed and tokenizer.eos_token_id is not None:
        ids = np.append(ids, np.int32(tokenizer.eos_token_id))
        loss_mask = np.append(loss_mask, True)
    num_cut = max(len(ids) - max_length, 0)
    if num_cut and too_long == "reject":
        raise RecordError("too_long", f"{len(ids)} tokens, and data.max_length = {max_length}")
    example = Example(conversation.example_id, ids[:max_length], loss_mask[:max_length].astype(np.uint8) * FULL_WEIGHT)
    if example.num_targets == 0:
        raise RecordError("no_target_left", f"all of the assistant's tokens lie beyond data.max_length = {max_length}")
    return example, num_cut


def special_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens that stand for structure, not text."""
    added = [token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special]
    return sorted({*added, *tokenizer.all_special_ids})


def render(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> tuple[str, list[Span]]:
    """Text of the whole conversation, and for each assistant message its [start, end) in it.

    Raises RecordError `template_refuses` where the template raises (it may insist on an order of roles), and
    `template_changes_turn` where a turn's content is not found, stripped or not, where the template puts it.
    """
    text = _apply(tokenizer, messages)
    marks = {number: f"\ue000{number}\ue001" for number, item in enumerate(messages) if item["role"] == "assistant"}
    marked = _apply(tokenizer, [{**item, "content": marks.get(n, item["content"])} for n, item in enumerate(messages)])
    spans: list[Span] = []
    position = 0
    for number, mark in marks.items():
        before, found, marked = marked.partition(mark)
        start = position + len(before)
        if not found or text[position:start] != before:
            raise _changed(number)
        following = marked.partition("\ue000")[0] if number != max(marks) else marked
        content = messages[number]["content"]
        for candidate in (content, content.strip(), content.lstrip(), content.rstrip()):
            if text.startswith(candidate + following, start):
                position = start + len(candidate)
                break
        else:
            raise _changed(number)
        spans.append((start, position))
    if text[position:] != marked:
        raise _changed(len(messages) - 1)
    return text, spans


def _apply(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False)
    except TemplateError as error:
        raise RecordError("template_refuses", f"the chat template refuses this conversation: {error}") from error


def _changed(number: int) -> RecordError:
    return RecordError("template_changes_turn", f"the chat template alters the content of message {number}")
