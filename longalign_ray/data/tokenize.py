"""Conversations to examples: token ids, and for each token how much its loss counts.

By default exactly what the assistant says and the token that ends its turn are targets. Texts go to the tokenizer in
batches, and characters are mapped to tokens at the borders of the turns only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from longalign_ray.config import DataConfig
from longalign_ray.data.conversation import Conversation, RecordError
from longalign_ray.data.store import FULL_WEIGHT, Example
from longalign_ray.data.template import Tokenizer
from longalign_ray.data.truncate import POLICIES
from longalign_ray.data.turns import Rendered, TurnFinder, special_tokens

Key = TypeVar("Key")
Encoding = Any  # tokenizers.Encoding

BATCH_CHARS = 1 << 19
BATCH_SIZE = 256
MAX_CUTS = 16


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The example of a conversation, or the consecutive examples that a long document is cut into."""

    examples: tuple[Example, ...]
    num_cut: int = 0
    """Tokens that were cut off to keep to data.max_length."""
    cut_answer: bool = False
    """Targets are among the tokens cut off the end: by `cut_right`, or where another policy finds too little to cut."""


class ConversationTokenizer:
    """Makes examples by the recipe's settings. One per process: it remembers what the template writes between turns."""

    def __init__(self, tokenizer: Tokenizer, config: DataConfig):
        self._config = config
        self._turns = TurnFinder(tokenizer)
        self._core = tokenizer.backend_tokenizer
        self._core.no_truncation()  # tokenizer.json may hold settings of its own
        self._core.no_padding()
        self._eos = tokenizer.eos_token_id
        self.special_ids = frozenset(tokenizer.convert_tokens_to_ids(special_tokens(tokenizer)))
        self._prompt_weight = (
            FULL_WEIGHT if config.train_on == "all" else round(config.prompt_loss_weight * FULL_WEIGHT)
        )

    def one(self, conversation: Conversation) -> Tokenized:
        """Raises RecordError: what `TurnFinder.find` raises; `too_long` where data.too_long has the example skipped or
        stop the run; `no_target` where every weight is 0, `no_target_left` where a cut left no target."""
        ((_, made),) = self.many([(None, conversation)])
        if isinstance(made, RecordError):
            raise made
        return made

    def many(
        self, conversations: Iterable[tuple[Key, Conversation | RecordError]]
    ) -> Iterator[tuple[Key, Tokenized | RecordError]]:
        """Each key with its examples or with the reason why there are none, in order; errors are handed on."""
        waiting: list[tuple[Key, Conversation | RecordError, Rendered | None]] = []
        num_chars = 0
        for key, conversation in conversations:
            rendered = None
            if isinstance(conversation, Conversation) and conversation.text is None:
                try:
                    rendered = self._turns.find(conversation)
                    num_chars += len(rendered.text)
                except RecordError as error:
                    conversation = error
            elif isinstance(conversation, Conversation):
                num_chars += len(conversation.text or "")
            waiting.append((key, conversation, rendered))
            if num_chars >= BATCH_CHARS or len(waiting) == BATCH_SIZE:
                yield from self._encoded(waiting)
                waiting, num_chars = [], 0
        yield from self._encoded(waiting)

    def _encoded(
        self, waiting: Sequence[tuple[Key, Conversation | RecordError, Rendered | None]]
    ) -> Iterator[tuple[Key, Tokenized | RecordError]]:
        texts = [rendered.text for _, _, rendered in waiting if rendered is not None]
        encodings = iter(self._core.encode_batch(texts, add_special_tokens=False) if texts else ())
        for key, conversation, rendered in waiting:
            if isinstance(conversation, RecordError):
                yield key, conversation
                continue
            try:
                if rendered is None:
                    yield key, self._document(conversation)
                else:
                    yield key, self._conversation(conversation, rendered, next(encodings))
            except RecordError as error:
                yield key, error

    def _document(self, conversation: Conversation) -> Tokenized:
        """Every token is a target; special tokens by the tokenizer's own rule, and EOS at the end in any case."""
        (encoding,) = self._core.encode_batch_fast([conversation.text], add_special_tokens=True)
        ids = encoding.ids
        if self._eos is not None and ids[-1:] != [self._eos]:
            ids.append(self._eos)
        if len(ids) < 2:
            raise RecordError("no_target", "the text has a single token, which nothing predicts")
        limit = self._config.max_length
        starts = list(range(0, len(ids), limit))
        if len(ids) - starts[-1] == 1 and limit > 2:
            starts[-1] -= 1  # a token by itself could not be predicted
        pieces = np.split(np.array(ids, dtype=np.int32), starts[1:])
        names = [f"{conversation.example_id}#{n}" for n in range(1, len(pieces) + 1)]
        if len(pieces) == 1:
            names = [conversation.example_id]
        weights = [np.full(len(piece), FULL_WEIGHT, dtype=np.uint8) for piece in pieces]
        return Tokenized(tuple(Example(*parts) for parts in zip(names, pieces, weights, strict=True)))

    def _conversation(self, conversation: Conversation, rendered: Rendered, encoding: Encoding) -> Tokenized:
        limit, policy = self._config.max_length, self._config.too_long
        example = self._example(conversation, rendered, encoding)
        if example.num_targets == 0:
            raise RecordError("no_target", "every token that something predicts has the loss weight 0")
        length = example.length
        if length <= limit:
            return Tokenized((example,))
        if policy in ("skip", "error"):
            raise RecordError("too_long", f"{length} tokens, and data.max_length = {limit}")
        if policy in POLICIES:
            example = self._shortened(conversation, example)
        num_targets = example.num_targets
        example = Example(example.example_id, example.input_ids[:limit], example.loss_weight[:limit])
        if example.num_targets == 0:
            raise RecordError("no_target_left", f"all targets lie beyond data.max_length = {limit}")
        return Tokenized((example,), length - example.length, example.num_targets < num_targets)

    def _shortened(self, conversation: Conversation, example: Example) -> Example:
        """The example made anew of fewer words until it fits; tokens may join differently at a cut, so not at once."""
        for _ in range(MAX_CUTS):
            excess = example.length - self._config.max_length
            if excess <= 0:
                break
            shorter = POLICIES[self._config.too_long](
                conversation, excess, num_tokens=example.length, encode=self._encode
            )
            if shorter is None:
                break
            conversation, rendered = shorter, self._turns.find(shorter)
            example = self._example(conversation, rendered, self._encode(rendered.text))
        return example

    def _encode(self, text: str) -> Encoding:
        return self._core.encode(text, add_special_tokens=False)

    def _example(self, conversation: Conversation, rendered: Rendered, encoding: Encoding) -> Example:
        """Weights: those of the messages where they have their own, else by data.train_on and data.prompt_loss_weight.

        A turn runs from its first token to the first special token after it, that one included; where a template closes
        the last turn with no special token, EOS is appended, so that the model learns to stop.
        """
        ids = encoding.ids
        weights = np.full(len(ids) + 1, self._prompt_weight, dtype=np.uint8)
        trained = self._trained_turns(conversation)
        following, closed = len(rendered.text), True
        for number in reversed(range(len(rendered.spans))):
            message, span = conversation.messages[number], rendered.spans[number]
            weight = FULL_WEIGHT if number in trained else self._prompt_weight
            if message.loss_weight is not None:
                weight = round(message.loss_weight * FULL_WEIGHT)
            says_end = number == len(rendered.spans) - 1 and message.role == "assistant"
            if span is None:
                if weight != self._prompt_weight:
                    raise RecordError(
                        "template_changes_turn", f"the chat template alters message {number}, which has a weight"
                    )
                continue
            if weight != self._prompt_weight or says_end:
                first = _token_from(encoding, span[0], len(rendered.text))
                last = _token_after(encoding, span[1], len(rendered.text))
                closing = self._closing_token(encoding, ids, last, following)
                closed = closed and (closing is not None or not says_end)
                weights[first : last if closing is None else closing + 1] = weight
                weights[-1] = weight if says_end else weights[-1]
            following = span[0]
        if not closed and self._eos is not None:
            ids.append(self._eos)
        return Example(conversation.example_id, np.array(ids, dtype=np.int32), weights[: len(ids)])

    def _trained_turns(self, conversation: Conversation) -> Sequence[int]:
        if self._config.train_on == "all":
            return range(len(conversation.messages))
        spoken = [n for n, message in enumerate(conversation.messages) if message.role == "assistant"]
        return spoken[-1:] if self._config.train_on == "last_assistant" else spoken

    def _closing_token(self, encoding: Encoding, ids: list[int], first: int, limit: int) -> int | None:
        """The first special token from token `first` on that starts before character `limit`."""
        for token in range(first, len(ids)):
            if encoding.token_to_chars(token)[0] >= limit:
                return None
            if ids[token] in self.special_ids:
                return token
        return None


def _token_from(encoding: Encoding, position: int, num_chars: int) -> int:
    """The first token that ends after character `position`. Characters that the tokenizer drops have no token."""
    for place in range(position, num_chars):
        if (token := encoding.char_to_token(place)) is not None:
            return token
    return len(encoding)


def _token_after(encoding: Encoding, position: int, num_chars: int) -> int:
    """The first token that starts at character `position` or after it."""
    token = _token_from(encoding, position, num_chars)
    while token < len(encoding) and encoding.token_to_chars(token)[0] < position:
        token += 1
    return token
