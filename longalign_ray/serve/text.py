"""Tokens to text as they come: no broken characters, and nothing at or after a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"
MAX_HELD_TOKENS = 8
"""A character has at most 4 bytes, so a longer run of undecodable tokens will never become one."""


class Detokenizer:
    """Text pieces that join to the text of all tokens; the bytes of an unfinished character are held back.

    Decoding starts a few tokens back, as the text of a token may depend on its left neighbour (the space that
    SentencePiece drops at the beginning of a text):

        tokens   a b c d e f      decode(c d) is out already; decode(c d e f) minus it is the next piece,
                     ^   ^        unless it ends in the middle of a character
                 context new
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0
        self._new = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete, often one word, sometimes nothing."""
        pieces = []
        for token_id in token_ids:
            self._ids.append(token_id)
            before = self._decode(self._ids[self._context : self._new])
            after = self._decode(self._ids[self._context :])
            unfinished = len(after) == len(before) or after.endswith(REPLACEMENT)
            if not unfinished or len(self._ids) - self._new >= MAX_HELD_TOKENS:
                pieces.append(after[len(before) :])
                self._context, self._new = self._new, len(self._ids)
        return "".join(pieces)

    def finish(self) -> str:
        """What is held back, without the character that was never finished."""
        before = self._decode(self._ids[self._context : self._new])
        after = self._decode(self._ids[self._context :])
        self._new = self._context = len(self._ids)
        return after[len(before) :].rstrip(REPLACEMENT)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopStrings:
    """Cuts a stream of text before the first stop string; text that may be the beginning of one is held back."""

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain to lie before any stop string."""
        if not self._stop or self.found:
            return "" if self.found else text
        self._held += text
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._release(min(places))
        return self._release(len(self._held) - self._unsure())

    def finish(self) -> str:
        """What is held back: the stream is over, so it began no stop string."""
        return "" if self.found else self._release(len(self._held))

    def _release(self, num_chars: int) -> str:
        released, self._held = self._held[:num_chars], self._held[num_chars:]
        return released

    def _unsure(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max(len(stop) for stop in self._stop) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
