"""RULER's needles in haystacks (arXiv 2404.06654, section 3.1): eight tasks of one form.

Needles state values of keys; some keys are asked for. The haystack is repeated noise, an essay, or needles with keys of
their own. Differences from the benchmark: the essay is generated (`haystack.py`), keys are adjectives before compounds
(`word_lists.py`) in place of nouns, and no key is drawn twice.
"""

from __future__ import annotations

import random
import re
import uuid
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from longalign_ray.evaluate.benchmark_rows import filled
from longalign_ray.evaluate.haystack import SENTENCE_END
from longalign_ray.evaluate.ruler.samples import UNBOUNDED, Sample, Sampler
from longalign_ray.evaluate.ruler.word_lists import compound_words, qualities
from longalign_ray.evaluate.ruler.words import PLACEHOLDER, RulerWords, Template

# Needles in an essay stand at 40 depths from 0 to 100 per cent of its sentences.
DEPTHS = tuple(round(100 * number / 39) for number in range(40))
Kind = Literal["words", "numbers", "uuids"]
DRAW: dict[Kind, Callable[[random.Random], str]] = {
    "words": lambda rng: f"{rng.choice(qualities())}-{rng.choice(compound_words())}",
    "numbers": lambda rng: str(rng.randrange(10**6, 10**7)),
    "uuids": lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
}


@dataclass(frozen=True, slots=True)
class NeedleTask:
    """num_keys needles, each of num_values values, num_queries of which are asked for."""

    haystack: Literal["noise", "essay", "needles"]
    keys: Kind = "words"
    values: Kind = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


class Essay:
    """A text's words, one space between them, and which words begin its sentences."""

    def __init__(self, text: str):
        self.words = text.split()
        ends = (place for place, word in enumerate(self.words, start=1) if SENTENCE_END.search(f"{word} "))
        self.sentence_starts = [0, *ends]

    def with_needles(self, num_words: int, needles: list[str], rng: random.Random) -> tuple[str, int]:
        """The first words with the needles between sentences, and the number of characters before the first needle."""
        num_sentences = bisect_left(self.sentence_starts, num_words)
        after = sorted(int(num_sentences * depth / 100) for depth in rng.sample(DEPTHS, len(needles)))
        places = [self.sentence_starts[n] if n < num_sentences else num_words for n in after]
        pieces = []
        for place, end, needle in zip([0, *places], [*places, num_words], [*needles, ""], strict=True):
            pieces += [*self.words[place:end], *([needle] if needle else [])]
        return " ".join(pieces), len(" ".join(self.words[: places[0]]))


def needle_sampler(task: NeedleTask, words: RulerWords, essay: Essay) -> Sampler:
    """Sizes are words of an essay, lines of noise, or needles beside those that count."""
    template = words.templates["niah"]
    shown: str = task.values
    if task.num_queries * task.num_values == 1:
        template, shown = _singular(template), task.values.removesuffix("s")

    def needle(key: str, value: str) -> str:
        return filled(words.needle, {"type_needle_v": task.values, "key": key, "value": value}, placeholder=PLACEHOLDER)

    def make(size: int, number: int, rng: random.Random) -> Sample:
        taken: set[str] = set()
        keys = [_new(DRAW[task.keys], rng, taken) for _ in range(task.num_keys)]
        values = {key: [_new(DRAW[task.values], rng, taken) for _ in range(task.num_values)] for key in keys}
        needles = [needle(key, value) for key in keys for value in values[key]]
        rng.shuffle(needles)
        queries = rng.sample(keys, task.num_queries)
        if task.haystack == "essay":
            context, shared = essay.with_needles(size, needles, rng)
        else:
            if task.haystack == "noise":
                lines = [words.noise] * size
            else:
                lines = [needle(_new(DRAW[task.keys], rng, taken), DRAW[task.values](rng)) for _ in range(size)]
            places = sorted(rng.sample(range(size), len(needles)))
            shared = places[0] * (len(words.noise) + 1) if task.haystack == "noise" else 0
            for place, one in zip(reversed(places), needles, strict=True):
                lines.insert(place, one)
            context = "\n".join(lines)
        query = queries[0] if len(queries) == 1 else f"{', '.join(queries[:-1])}, and {queries[-1]}"
        answers = [value for key in queries for value in values[key]]
        return Sample(template, {"context": context, "query": query, "type_needle_v": shown}, answers, shared)

    most = len(essay.words) if task.haystack == "essay" else UNBOUNDED
    return Sampler(make, least=task.num_keys * task.num_values, most=most)


def _singular(template: Template) -> Template:
    """The text for one value, by the benchmark's rule."""

    def one(text: str) -> str:
        return re.sub("are all|are", "is", text.replace("Some", "A"))

    return replace(template, question=one(template.question), answer_prefix=one(template.answer_prefix))


def _new(draw: Callable[[random.Random], str], rng: random.Random, taken: set[str]) -> str:
    while (made := draw(rng)) in taken:
        pass
    taken.add(made)
    return made
