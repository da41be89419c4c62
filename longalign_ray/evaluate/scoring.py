"""Scores of a text against a reference, by rule; no model judges."""

from __future__ import annotations

import re
from collections.abc import Sequence

WORD = re.compile(r"\w+")

# Words that carry no fact of their own; an answer is not right because it shares them.
FUNCTION_WORDS = frozenset(
    WORD.findall(
        "a an and are as at be beside but by for from has have he her his i in into is it its of on or she that the "
        "their them there they this to under was were what which who will with you your"
    )
)


def words(text: str) -> list[str]:
    """Words in order, case folded, without punctuation."""
    return WORD.findall(text.casefold())


def content_words(text: str) -> list[str]:
    """Distinct words that carry the facts, in order of first appearance."""
    return [word for word in dict.fromkeys(words(text)) if word not in FUNCTION_WORDS]


def content_recall(text: str, *, reference: str) -> float:
    """Share of the reference's content words that the text contains, 0 to 1.

    Raises ValueError where the reference has none.
    """
    wanted = content_words(reference)
    if not wanted:
        raise ValueError(f"the reference {reference!r} has no content words")
    present = set(words(text))
    return sum(word in present for word in wanted) / len(wanted)


def contains_phrase(text: str, *, phrase: str) -> bool:
    """Whether the words of the phrase stand in the text next to each other and in order."""
    return f" {' '.join(words(phrase))} " in f" {' '.join(words(text))} "


def string_match_all(text: str, references: Sequence[str]) -> float:
    """Share of the references that stand in the text, whatever the case of letters (RULER's metric of this name)."""
    return sum(reference.lower() in text.lower() for reference in references) / len(references)


def string_match_part(text: str, references: Sequence[str]) -> float:
    """1 where one of the references stands in the text, whatever the case of letters, else 0 (RULER)."""
    return float(any(reference.lower() in text.lower() for reference in references))
